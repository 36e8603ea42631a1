"""The subcommands of dataflex-cli, one file each."""
