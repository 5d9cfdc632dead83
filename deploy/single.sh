#!/bin/sh
# One container with all of it: SQLite, no Redis. Set up, then serve. Everything it keeps is in DATA_DIR.
set -eu
sh "$(dirname "$0")/init.sh"
cd "$(dirname "$0")/.."
exec python manage.py serve --host 0.0.0.0 --port 8000
