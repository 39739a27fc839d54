"""report.json as a page and as the README's tables; sentences stand in templates, figures in claims.py."""
