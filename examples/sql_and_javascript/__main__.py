"""`python -m examples.sql_and_javascript`."""

from examples.sql_and_javascript.run import main

main()
