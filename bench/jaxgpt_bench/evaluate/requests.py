"""Twenty requests, each with a name that fits and a check that a right program passes.

They were written before any model was trained for them. The first is the earlier project's.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class CodeRequest:
    """What is asked for.

    Attributes:
      text: the prompt.
      names: a regular expression that a fitting function's name holds, in lower case.
      check: Python that passes when `f`, the function, is right.
    """

    text: str
    names: str
    check: str

    def fits(self, name: str) -> bool:
        """Whether a function's name fits the request."""
        return re.search(self.names, name.lower()) is not None


REQUESTS = (
    CodeRequest(
        "Python program to calculate the average",
        "average|mean|avg",
        "assert abs(f([1, 2, 3, 6]) - 3) < 1e-9 and abs(f([5]) - 5) < 1e-9",
    ),
    CodeRequest(
        "Write a Python function to reverse a string",
        "revers",
        "assert f('abc') == 'cba' and f('') == '' and f('a b') == 'b a'",
    ),
    CodeRequest(
        "Python program to check whether a number is prime",
        "prime",
        "assert [n for n in range(2, 30) if f(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]",
    ),
    CodeRequest(
        "Write a function to compute the factorial of a number",
        "factorial",
        "assert [f(n) for n in range(1, 7)] == [1, 2, 6, 24, 120, 720]",
    ),
    CodeRequest(
        "Python program to find the largest number in a list",
        "max|larg|big|great",
        "assert f([3, 9, 2]) == 9 and f([-5, -2]) == -2",
    ),
    CodeRequest(
        "Write a function that counts the vowels in a string",
        "vowel",
        "assert f('education') == 5 and f('xyz') == 0",
    ),
    CodeRequest(
        "Write a Python function to remove duplicates from a list",
        "dup|uniq|distinct",
        "assert sorted(f([3, 1, 3, 2, 1])) == [1, 2, 3]",
    ),
    CodeRequest(
        "Write a function that checks if a string is a palindrome",
        "palindrom",
        "assert f('level') and f('abba') and not f('abca')",
    ),
    CodeRequest(
        "Python program to compute the nth Fibonacci number",
        "fib",
        "assert [f(n) for n in range(2, 9)] in ([1, 2, 3, 5, 8, 13, 21], [1, 1, 2, 3, 5, 8, 13])",
    ),
    CodeRequest(
        "Write a function to find the greatest common divisor of two numbers",
        "gcd|divisor|common|hcf",
        "assert f(12, 18) == 6 and f(7, 5) == 1",
    ),
    CodeRequest(
        "Write a Python function to sort a list of numbers",
        "sort|order",
        "data = [3, 1, 2, 1]\nresult = f(data)\n"
        "assert list(data if result is None else result) == [1, 1, 2, 3]",
    ),
    CodeRequest(
        "Write a function to merge two dictionaries",
        "merg|combin|dict|join|update|union",
        "first = {'a': 1}\nresult = f(first, {'b': 2})\n"
        "assert (first if result is None else result) == {'a': 1, 'b': 2}",
    ),
    CodeRequest(
        "Python program to convert Celsius to Fahrenheit",
        "celsius|fahrenheit|temp|c_to_f|c2f",
        "assert abs(f(100) - 212) < 1e-6 and abs(f(0) - 32) < 1e-6",
    ),
    CodeRequest(
        "Write a function that flattens a nested list",
        "flat",
        "assert list(f([[1, 2], [3], [4]])) == [1, 2, 3, 4]",
    ),
    CodeRequest(
        "Write a function that counts the words in a text",
        "word|count",
        "found = f('one two three two')\n"
        "assert found == 4 or dict(found) == {'one': 1, 'two': 2, 'three': 1}",
    ),
    CodeRequest(
        "Python program to compute the sum of the digits of a number",
        "digit|sum",
        "assert f(1234) == 10 and f(7) == 7",
    ),
    CodeRequest(
        "Write a function that tells if a year is a leap year",
        "leap|year",
        "assert [bool(f(year)) for year in (1900, 2000, 2023, 2024)] == [False, True, False, True]",
    ),
    CodeRequest(
        "Write a Python function to calculate the area of a circle",
        "area|circle",
        "assert abs(f(2) - 12.56637) < 0.05",
    ),
    CodeRequest(
        "Write a function to find the common elements of two lists",
        "common|inter|shared|same",
        "assert sorted(f([1, 2, 3, 4], [2, 4, 6])) == [2, 4]",
    ),
    CodeRequest(
        "Write a function that checks whether two strings are anagrams",
        "anagram",
        "assert f('listen', 'silent') and not f('abc', 'abd')",
    ),
)
