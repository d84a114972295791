#!/usr/bin/env bash
# From a fresh clone to answers about pictures: environment, small frozen models, training, figures, demo page.
#
#     ./scripts/quickstart.sh              # all of it; the page opens on 127.0.0.1
#     ./scripts/quickstart.sh --no-demo    # the same, for scripts
#     ./scripts/quickstart.sh --help       # the other options
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

# Help is due at once, not after an install: quickstart.py needs nothing but the standard library to print it.
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            if environment_ready run; then QB_PYTHON="$QB_VENV/bin/python"; else find_python; fi
            exec "$QB_PYTHON" "$QB_ROOT/scripts/quickstart.py" --help ;;
    esac
done

prepare_environment run
exec "$QB_VENV/bin/python" "$QB_ROOT/scripts/quickstart.py" "$@"
