"""`python -m armor`: the command `armor`."""

from armor.command.entry import main

if __name__ == "__main__":
    main()
