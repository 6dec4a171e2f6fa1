"""What `amimv.tools.report` is made of: runs as tables, figures, verdicts and a page."""
