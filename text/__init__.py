"""What API, maintenance and engines know of a model's text: its files, templates, tokens, grammars, output. Never torch."""
