"""`python -m study.baselines`."""

from study.baselines import METHODS, Config, main

__all__ = ["METHODS", "Config", "main"]

if __name__ == "__main__":
    main()
