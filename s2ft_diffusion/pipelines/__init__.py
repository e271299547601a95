"""The verbs on diffusers pipelines, and how adapters get into models and out of them."""
