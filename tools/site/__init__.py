"""What mkdocs.yml takes beside docs/: pages made of the package, docstrings in Markdown, mathematics in MathML."""
