"""Model files, chat templates, tokens, grammars and outputs, without torch; shared by the API and engines."""
