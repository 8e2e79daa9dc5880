"""``python -m flash_attn_jit``: what there is to run, and a report of the environment for bug reports."""

from ._environment_report import main

if __name__ == "__main__":
    main()
