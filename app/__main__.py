"""`python -m app` is `lvdm-app`."""

from app.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
