"""`make bench`: the measurements that need no GPU and no earlier run."""

from benchmarks import planning, startup

if __name__ == "__main__":
    startup.main()
    planning.main()
