"""The page's tabs, each a file: its parts, its events, what its buttons do, its words."""
