"""A pipeline as users write it, with its code, for tests of the commands. It imports ``helper``."""

from __future__ import annotations

GOOD = """\
name: sums
parameters:
  count: {type: int, default: 3, min: 1}
  name: {type: str}
steps:
  numbers:
    uses: sums:numbers
    with: {count: "${{ params.count }}"}
  double:
    uses: sums:double
    foreach: ${{ steps.numbers.output }}
    with: {number: "${{ item }}"}
    retry: {max_attempts: 2, initial_s: 0}
  report:
    uses: sums:report
    with: {name: "hello ${{ params.name }}", values: "${{ steps.double.output }}"}
"""
CODE = """\
import helper
import mlplat

def numbers(count):
    print("making", count)
    return list(range(count))

def double(number):
    step = mlplat.current_step()
    if number == 1 and step.attempt == 1:
        raise RuntimeError("flaky on purpose")
    return helper.twice(number)

def report(name, values):
    print(name, values)
    return {"name": name, "total": sum(values)}
"""
HELPER = "def twice(number):\n    return 2 * number\n"
