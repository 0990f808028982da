"""`python -m study.baselines`."""

from study.baselines import main

if __name__ == "__main__":
    main()
