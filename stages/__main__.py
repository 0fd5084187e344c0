"""Entry point of the command: install the signal handlers before anything else is imported."""

from prefcache import interrupts


def main() -> None:
    interrupts.install()
    from prefcache.cli import main

    main()


if __name__ == "__main__":
    main()
