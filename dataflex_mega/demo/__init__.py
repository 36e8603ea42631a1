"""What `dataflex-cli demo` trains: small data of five kinds, a random model, and a configuration with a mixer."""
