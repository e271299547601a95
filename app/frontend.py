"""What Gradio's own parts cannot do: style, in one place."""

CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: auto}
#masthead {padding: 4px 2px 0}
#masthead h1 {font-size: 1.5rem; margin: 0}
#masthead p {margin: 0; color: var(--body-text-color-subdued)}
.beside {align-self: flex-end; height: 44px}
footer {display: none !important}
@media (max-width: 640px) {
  .gradio-container, .gradio-container .app {padding: 8px !important}
  #masthead h1 {font-size: 1.2rem}
}
"""
