"""`python -m brainray COMMAND …` runs `brainray COMMAND …`."""

from brainray.cli import main

if __name__ == "__main__":
    main()
