from cllm.cli.main import main

main()
