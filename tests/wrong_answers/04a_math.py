# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="04a.1" says="that is the sum over the rows, not their mean"
def one_step():
    return 1 + 0.1 * 28, 1 + 0.1 * 6


# %% task="04a.1" says="that is without the 2 that comes from the square"
def one_step():
    return 1 + 0.1 * 14 / 3, 1 + 0.1 * 3 / 3


# %% task="04a.1" says="that is a step up the hill"
def one_step():
    return 1 - 0.1 * 28 / 3, 1 - 0.1 * 6 / 3


# %% task="04a.1" says="b is not 1.933 after the step"
def one_step():  # b's gradient taken for w's
    return 1 + 0.1 * 28 / 3, 1 + 0.1 * 28 / 3


# %% task="04a.1" says="w is nearly 1.93: give four decimals"
def one_step():
    return 1.93, 1.2


# %% task="04a.2" says="is 3 times the gradient"
def my_term(x, y, w, count):  # as if each rank divided by ... a third of it
    return 2 * x.T @ (x @ w - y) / (count / 3)


# %% task="04a.2" says="Shares of [4, 4] rows: the sum of the terms is 2 times the gradient"
def my_term(x, y, w, count):  # this rank's own count
    return 2 * x.T @ (x @ w - y) / y.numel()


# %% task="04a.2" says="Shares of [4, 4] rows: the sum of the terms is 2 times the gradient"
def my_term(x, y, w, count):  # by the rows, not by the elements
    return 2 * x.T @ (x @ w - y) / (count // y.size(1))


# %% task="04a.2" says="Shares of [4, 4] rows: the sum of the terms is 0.5 times the gradient"
def my_term(x, y, w, count):
    return x.T @ (x @ w - y) / count


# %% task="04a.2" says="A term has the shape (2, 3), and w is (3, 2)"
def my_term(x, y, w, count):
    return 2 * (x @ w - y).T @ x / count


# %% task="04a.3" says="a token of rank 0 weighs 0.0083333, you give 0.0125. 1/80 is what it should weigh"
def weights(counts):  # the right mean
    each = [Fraction(1, sum(counts)) if n else Fraction(0) for n in counts]
    return each, Fraction(1)


# %% task="04a.3" says="a token of rank 0 weighs 0.125, you give 0.25"
def weights(counts):  # the average over the ranks forgotten
    some = [n for n in counts if n]
    return [Fraction(1, n) if n else Fraction(0) for n in counts], Fraction(max(some), min(some))


# %% task="04a.3" says="heaviest over lightest is 3, you give 0.3333"
def weights(counts):
    some = [n for n in counts if n]
    return [Fraction(1, len(counts) * n) if n else Fraction(0) for n in counts], Fraction(min(some), max(some))


# %% task="04a.3" says="[3, 0, 6]: a token of rank 0 weighs 0.11111, you give 0.16667"
def weights(counts):  # averaged over the ranks that have some
    some = [n for n in counts if n]
    return [Fraction(1, len(some) * n) if n else Fraction(0) for n in counts], Fraction(max(some), min(some))


# %% task="04a.3" says="ZeroDivisionError"
def weights(counts):
    return [Fraction(1, len(counts) * n) for n in counts], Fraction(max(counts), min(counts))


# %% task="04a.3" says="0.125 is no Fraction, and is not exact"
def weights(counts):
    each = [1 / (len(counts) * n) if n else 0 for n in counts]
    return each, max(each) / min(w for w in each if w)


# %% task="04a.4" says="rank 0's gradient of its part of A is off by"
def cut_layers(x, a, b, gradient_of, total):  # as it was
    h = [(x @ part).relu() for part in a]
    y = total([one @ part for one, part in zip(h, b)])
    g = gradient_of(y)
    before = [total([g @ part.T for part in b]) * (one > 0) for one in h]
    return y, [x.T @ one for one in before], before[0] @ a[0].T


# %% task="04a.4" says="y and A's gradients are right, x's is off by"
def cut_layers(x, a, b, gradient_of, total):  # rank 0's term alone
    h = [(x @ part).relu() for part in a]
    y = total([one @ part for one, part in zip(h, b)])
    g = gradient_of(y)
    before = [(g @ part.T) * (one > 0) for one, part in zip(h, b)]
    return y, [x.T @ one for one in before], before[0] @ a[0].T


# %% task="04a.4" says="rank 0's gradient of its part of A is off by"
def cut_layers(x, a, b, gradient_of, total):  # the bend forgotten in backward
    h = [(x @ part).relu() for part in a]
    y = total([one @ part for one, part in zip(h, b)])
    g = gradient_of(y)
    before = [g @ part.T for part in b]
    return y, [x.T @ one for one in before], total([one @ part.T for one, part in zip(before, a)])


# %% task="04a.4" says="3 sums over the ranks"
def cut_layers(x, a, b, gradient_of, total):  # right, with one sum too many
    h = [(x @ part).relu() for part in a]
    y = total([one @ part for one, part in zip(h, b)])
    total(h)
    g = gradient_of(y)
    before = [(g @ part.T) * (one > 0) for one, part in zip(h, b)]
    return y, [x.T @ one for one in before], total([one @ part.T for one, part in zip(before, a)])
