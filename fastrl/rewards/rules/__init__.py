"""What an answer in a box means: one rule per file, in exact arithmetic, in bounded time, without sympy.

`fastrl/rewards/math.py` asks them in its order of reading.
"""
