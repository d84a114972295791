#!/usr/bin/env bash
# Lint, types and tests in the environment that the other scripts use; each is run even where one before it failed.
#
#     ./scripts/test.sh                    # everything
#     ./scripts/test.sh -k bridge -x       # arguments go to pytest
set -uo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd "$QB_ROOT" || exit 1
trap 'say "tests stopped"; exit 130' INT

failed=""
summary=""

# stage NAME COMMAND…
stage() {
    local name="$1" start=$SECONDS status=0 outcome=passed
    shift
    printf '\n== %s\n' "$name"
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        outcome="FAILED (exit code $status)"
        failed="$failed, $name"
    fi
    summary="$summary$(printf '%-8s %s, %d s' "$name" "$outcome" $((SECONDS - start)))
"
}

stage lint "$QB_VENV/bin/ruff" check .
stage format "$QB_VENV/bin/ruff" format --check .
stage types "$QB_VENV/bin/mypy"
# two processes of one thread each, a file in either at a time; the options that follow may say otherwise
stage tests "$QB_VENV/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"

printf '\n== summary\n%s' "$summary"
if [ -n "$failed" ]; then
    printf 'failed: %s\n' "${failed#, }"
    exit 1
fi
printf 'all passed\n'
