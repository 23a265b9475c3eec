"""One module a subcommand of `calm`; each is imported only when it is asked
for.
"""
