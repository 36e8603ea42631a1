"""The commands of `dataflex-cli`: `commands/regmix.py` is `dataflex-cli regmix`.

A module here has `main(argv) -> int`, which runs the command and returns its exit status, `SUMMARY`, its line of
`dataflex-cli help`, and `HELP_ORDER`, where that line stands. A module whose name begins with `_` is no command. Modules are
imported to print the help, so what is heavy is imported inside `main`.
"""
