-- The user of Grafana's tenant dashboard: it may read counts, times and names, but no prompt, output, key or metadata.
-- Safe to repeat: psql --variable=password=... --file=reader.sql

SELECT 'CREATE ROLE celeriac_grafana LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'celeriac_grafana') \gexec

ALTER ROLE celeriac_grafana PASSWORD :'password';
ALTER ROLE celeriac_grafana SET statement_timeout = '10s';
ALTER ROLE celeriac_grafana SET default_transaction_read_only = on;

GRANT SELECT (id, name, weight, max_queued) ON tenants TO celeriac_grafana;
GRANT SELECT (tenant_id, num_queued, num_running) ON tenant_load TO celeriac_grafana;
GRANT SELECT (tenant_id, model, lane, status, created_at, started_at, finished_at, num_prompt_tokens, num_committed_tokens)
    ON jobs TO celeriac_grafana;
