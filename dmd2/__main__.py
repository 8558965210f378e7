from dmd2.cli import main

main()
