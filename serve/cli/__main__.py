"""`python -m serve.cli` is the `querybridge` command; `accelerate launch -m serve.cli` starts one a process."""

from serve.cli.command import main

if __name__ == "__main__":
    main()
