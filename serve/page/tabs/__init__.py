"""The page's tabs, one module a tab."""
