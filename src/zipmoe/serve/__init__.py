"""An OpenAI-compatible server over a loaded model: continuous batching, metrics, a page.

The optional extra `serve`. Nothing of the package but the command `zipmoe serve` imports it.
"""
