"""The page's parts: what all tabs share, and one module a tab. `serve.demo` puts them together and serves them."""
