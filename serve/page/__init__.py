"""The page's parts: what all tabs share, and one module a tab. `serve.page.app` puts them together and serves them."""
