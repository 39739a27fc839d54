"""Reading local files: which files of a folder are text, texts cut into documents, rows of tables."""
