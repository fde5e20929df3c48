#!/usr/bin/env bash
# Submit a file of prompts as a Ray job and wait for it: generate.sh ADDRESS PROMPTS.jsonl [paceline generate flags]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 http://HEAD:8265 PROMPTS.jsonl [paceline generate flags]" >&2
    exit 2
fi
address=$1 prompts=$2
shift 2
[ -f "$prompts" ] || { echo "no such file: $prompts" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
upload=$(mktemp -d)
trap 'rm -rf "$upload"' EXIT
cp -rL "$root/.src/." "$upload/"                            # links become files, so that the upload is whole
find "$upload" -name __pycache__ -prune -exec rm -rf {} +
cp "$prompts" "$upload/prompts.jsonl"
exec_ray=${RAY:-ray}
"$exec_ray" job submit --address "$address" --working-dir "$upload" -- \
    python -m paceline generate --prompts-file prompts.jsonl "$@"
