"""Running a command as a user does, and reading what a study leaves."""


def exit_code(main, *arguments):
    """Return the exit code, whether the command or the parser gave it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


def texts(folder):
    """Return what a study leaves but its figures."""
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("*.json"))
    }
