"""report.json as a page and as blocks of docs/; sentences stand in templates, figures in claims.py."""
