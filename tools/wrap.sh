R=/work/main/.venv/bin
$R/ruff check --select E501 --output-format concise . | grep E501 | sort -t: -k1,1 -k2,2nr | while IFS=: read f l rest; do $R/ruff format -q --range=$l-$((l+1)) "$f"; done
$R/ruff check --select E501 --output-format concise . | grep E501
