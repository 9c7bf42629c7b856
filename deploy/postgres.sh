#!/bin/sh
# PostgreSQL's image runs this when its volume is new. Celeriac's role owns its database and is no superuser, so that
# row-level security holds for it (docs/adr/0058). It may see what all sessions wait for, which /health and doctor tell,
# end one that others wait for, and create roles, such as Grafana's. Its password is that of the superuser.
set -eu
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    --set password="$POSTGRES_PASSWORD" <<'SQL'
CREATE ROLE celeriac LOGIN CREATEROLE PASSWORD :'password' IN ROLE pg_monitor, pg_signal_backend;
CREATE DATABASE celeriac OWNER celeriac ENCODING 'UTF8' TEMPLATE template0;
SQL
