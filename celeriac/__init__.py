"""What users run and import: the `celeriac` command, and `celeriac.client`, an HTTP client for the API."""
