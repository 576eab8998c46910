"""Extensions for mkdocs.yml: pages generated from the package, docstrings in Markdown, mathematics in MathML."""
