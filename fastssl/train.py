"""fastssl-train: train a configuration, --plan what it would cost, or --list the recipes."""

from __future__ import annotations

import sys

from fastssl.cli import run_command
from fastssl.config.command_line import parse


def main(argv: list[str] | None = None) -> int:
    """The console command. Returns the exit status: 0 done, 2 bad input, 130 stopped."""

    def command(arguments: list[str]) -> int:
        # Imported when needed: --help is to be quick.
        if "--list" in arguments:
            from fastssl.planning.listing import list_presets

            list_presets([word for word in arguments if word != "--list"])
            return 0
        config = parse(arguments)
        if config.run.plan or config.run.fit is not None:
            from fastssl.planning import plan

            return plan.run(config)
        from fastssl.training import trainer

        return 130 if trainer.train(config)["stopped"] else 0

    return run_command("fastssl-train", command, argv)


if __name__ == "__main__":
    sys.exit(main())
