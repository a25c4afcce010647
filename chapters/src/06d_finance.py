# %% [markdown] lang="en"
# # Finance
#
# The document's section 6.4 names two uses: **automated trading** and **risk management**. This chapter tries both, on
# a market that we make ourselves. That has one great advantage: for once the best possible answer is *known*, and every
# model can be held against it. At the end you can
#
# - say how sure a Sharpe ratio is, and how many years it takes to know;
# - compute the best rule there is, with costs, and use it as a ceiling: whatever is above is a leak, or luck;
# - have the course's small GPT read returns in place of words, on two layouts with equal results;
# - recognize three ways to fool yourself, since you have built them;
# - forecast a quantile, count how often it was exceeded, and test whether that is right.
#
# **What this chapter does not show.** Nothing here says anything about real markets. The returns are drawn by a random
# number generator with rules that we chose, and that stay the same for a hundred years. Real markets have rules that
# nobody knows, that change, and that change because people trade on them. No result below can be carried over, and
# **none of it is advice**. What carries over are the methods of checking.
#
# **Time:** about an hour and a half. **You need:** [Language models](02a_language_models.ipynb),
# [data](03a_data_parallel.ipynb) and [tensor parallelism](03b_tensor_parallel.ipynb), and section 1 of [which model,
# which layout, and how](04c_faq.ipynb). The chapter mirrors section 6.4 of the document that this course follows and
# tests, 《大规模语言模型从理论到实践 混合并行》.
#
# **How to read it.** As before: write your prediction into the cell before you run it. Nothing is downloaded.
#
# ## Three questions on the chapters before
#
# 1. Why does position 5 of a row know nothing of position 6, in a GPT?
# 2. Two classifiers were judged by the same rows. Their intervals overlap. Are they equally good?
# 3. What is a baseline for?
#
# <details><summary>Answers</summary>
#
# 1. The causal mask: attention at a position sees that position and earlier ones.
# 2. One cannot say from the intervals. Count the rows where only one of them is right ([Vision](06c_vision.ipynb)).
# 3. It is what anything else has to beat before it is worth its price.
#
# </details>

# %%
import math
import time

import numpy as np
import torch
from scipy import stats
from scipy.optimize import minimize
from scipy.signal import lfilter
from sklearn.neighbors import KNeighborsRegressor
from torch import nn

import minipar
from minipar import Config, Mesh, World, here, parallelize, viz

two = World(2)

# %% [markdown] lang="en"
# ## 1. A market of our own
#
# A **[return](../docs/glossary.md#return)** is what a price gains in a day, as a share: 0.01 is one percent. Ours are
#
# $$r_t = m_t + \sigma_t\,\varepsilon_t$$
#
# - $\varepsilon_t$ is noise with mean 0 and variance 1. It has **fat tails**: Student's t with 5 degrees of freedom, so
#   that large moves are more frequent than in a normal distribution.
# - $\sigma_t$, the **[volatility](../docs/glossary.md#volatility)**, moves: wild days follow wild days. This is
#   GARCH(1,1) (Bollerslev 1986), $\sigma_{t+1}^2 = \omega + \alpha\,\sigma_t^2\varepsilon_t^2 + \beta\,\sigma_t^2$:
#   tomorrow's variance is a constant, a part of today's squared shock, and a part of today's variance. In the long run
#   its mean is $\omega/(1-\alpha-\beta)$.
# - $m_t$ is the **predictable part**: a constant drift $\mu$, and a little of what was recently drawn. If the last days
#   were better than expected, so is the next: $m_t = \mu + a\,s_t$ with $s_{t+1} = \lambda s_t +
#   \sqrt{1-\lambda^2}\,\varepsilon_t$, so that $s$ has mean 0 and variance 1, too.
#
# The last point is our invention, and a generous one. These are all parameters ($\omega$ follows from the variance in
# the long run):

# %%
MARKET = {
    "drift": 0.0002,  # mu, a day: about 5 percent a year
    "signal": 0.001,  # a
    "memory": 0.9,  # lambda
    "shock": 0.08,  # alpha
    "persistence": 0.90,  # beta
    "variance": 1e-4,  # of a day, in the long run: a volatility of 1 percent
    "freedom": 5,  # degrees of freedom of the noise
}
DAYS, LEARN = 30_000, 20_000  # to learn from, the first 20,000; to judge by, the other 10,000


# %%
def market(seed, rule=lambda s, variance: s, days=DAYS, p=MARKET):
    """Returns, and what only their maker knows: the predictable part, the volatility, and s. rule: of (s, variance)."""
    spread = math.sqrt(p["freedom"] / (p["freedom"] - 2))  # of Student's t
    noise = np.random.default_rng(seed).standard_t(p["freedom"], days + 1000) / spread
    base = (1 - p["shock"] - p["persistence"]) * p["variance"]
    s, variance, rows = 0.0, p["variance"], np.empty((days + 1000, 4))
    for t, e in enumerate(noise):
        mean = p["drift"] + p["signal"] * rule(s, variance)
        rows[t] = mean + math.sqrt(variance) * e, mean, math.sqrt(variance), s
        s = p["memory"] * s + math.sqrt(1 - p["memory"] ** 2) * e
        variance = base + (p["shock"] * e * e + p["persistence"]) * variance
    return rows[1000:].T  # the first days only forget the start


returns, mean, volatility, signal = market(seed=1)
test = slice(LEARN, None)
for name, value in MARKET.items():
    print(f"{name:12} {value}")

# %%
drawing, panels = viz.figure(8, 3.6, rows=2)
some = slice(LEARN, LEARN + 1000)
panels[0].plot(100 * returns[some], lw=0.6, color=viz.PALETTE[5])
panels[0].plot(100 * volatility[some], lw=1.2, color=viz.PALETTE[6])
panels[0].set(ylabel="percent", xticks=[])
panels[0].set_title("returns of 1,000 days, and the volatility that nobody sees", fontsize=10)
panels[1].plot(1e4 * mean[some], lw=0.8, color=viz.PALETTE[2])
panels[1].axhline(0, color=viz.INK, lw=0.6)
panels[1].set(ylabel="1/100 percent", xlabel="day")
panels[1].set_title("the predictable part, in units a hundred times smaller", fontsize=10)
alt = (
    "Above: daily returns scatter around zero by about 1 percent, with calm and wild stretches; the volatility follows "
    "them. Below: the predictable part wanders around zero, mostly within 0.1 percent and at most by half a percent."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# **Question.** What share of the variance of a day's return is predictable, for one who knows everything? Compute it
# from the parameters.

# %%
prediction = None  # a share

share = MARKET["signal"] ** 2 / (MARKET["signal"] ** 2 + MARKET["variance"])
print(f"you wrote: {prediction} - {share:.2%} by the parameters, {mean.var() / returns.var():.2%} of these days")
print(f"excess kurtosis {stats.kurtosis(returns):.1f} (0 in a normal distribution)")
assert 0.009 < share < 0.0101 and stats.kurtosis(returns) > 3


# %% [markdown] lang="en"
# One percent. The other ninety-nine are noise, for everybody. (For a real market that would be a great deal. Campbell
# and Thompson 2008 forecast a small share of a *month's* variance, and find it worth money.) And there are nearly 120
# years of it, 80 to learn from and 40 to judge by, at 252 trading days a year.
#
# The *kurtosis* says how fat the tails are: the mean fourth power of a deviation, over the square of the variance. It
# is 3 in a normal distribution, and the *excess* is what is above 3. Student's t with 5 degrees of freedom has an
# excess of 6. The rest comes from the moving volatility. (Do not expect the same number from another seed. The fourth
# moment of a GARCH is finite only if $\alpha^2\,\mathrm{E}\,\varepsilon^4 + 2\alpha\beta + \beta^2 < 1$, where
# $\mathrm{E}\,\varepsilon^4 = 9$ here. Ours has 1.01 on the left side, so it has none.)
#
# ## 2. What is a rule worth?
#
# A rule says each evening which **position** to hold the next day: 1 is all of one's money in, −1 bets the same on a
# fall, 0 stays out. The day gives position × return. Whoever changes the position pays a **cost** on the amount that is
# traded: 0.05 percent here, so 0.1 percent for a turn from −1 to 1. Interest, taxes, dividends and the cost of betting
# on a fall are left out.
#
# Profits are compared with their risk. The **[Sharpe ratio](../docs/glossary.md#sharpe-ratio)** (Sharpe 1966) is the
# mean of the daily profits over their standard deviation. By custom it is multiplied by $\sqrt{252}$, which makes it a
# year's. (Interest is taken off the profits first. Here there is none.)
#
# **Question.** Just hold: position 1, always. The drift is 0.02 percent a day and the volatility 1 percent. What is the
# Sharpe ratio? And how many years of data does it take until two of its standard errors are smaller than it?

# %%
prediction = None  # (Sharpe ratio, years)

YEAR, COST = 252, 0.0005


def sharpe(profits):
    return profits.mean() / profits.std() * math.sqrt(YEAR)


def error_of_sharpe(profits):
    """Its standard error, if days are independent (Lo 2002): that of the mean, and a bit for the deviation."""
    daily = profits.mean() / profits.std()
    return math.sqrt((1 + daily**2 / 2) / len(profits) * YEAR)


long_run = MARKET["drift"] / math.sqrt(MARKET["variance"]) * math.sqrt(YEAR)
print(f"you wrote: {prediction} - {long_run:.2f}, and {(2 / long_run) ** 2:.0f} years")
assert 38 < (2 / long_run) ** 2 < 41
hold = returns[test]
print(f"the 40 years that we judge by: {sharpe(hold):.2f} ± {error_of_sharpe(hold):.2f}")

# %% [markdown] lang="en"
# The formula, derived in a line: the mean of $n$ days has the standard error $\sigma/\sqrt n$, so the daily ratio has
# $1/\sqrt n$, and the yearly one $\sqrt{252/n}$: **one over the root of the number of years**. So 0.32 takes
# $(2/0.32)^2$, about 40 years. (Lo's second term comes from the error of the deviation. His is that of normal noise.
# With fat tails it is larger, but it stays small: the square of a *daily* ratio is below a thousandth.)
#
# It assumes independent days. **Question.** Ours are not, quite: a good day is followed by slightly better ones. Does
# one percent of the variance matter? We have a generator, so we can look: 200 times ten years of other luck.

# %%
prediction = None  # how many times the formula

decades = np.array([sharpe(market(seed=100 + i, days=2520)[0]) for i in range(200)])
formula = error_of_sharpe(returns[:2520])
shock = MARKET["signal"] * math.sqrt(1 - MARKET["memory"] ** 2) / (1 - MARKET["memory"])
larger = 1 + shock / math.sqrt(MARKET["variance"])
print(f"you wrote: {prediction} - ten years: formula {formula:.2f}, deviation over 200 draws {decades.std():.2f}")
print(f"the luckiest ten years {decades.max():.2f}, the unluckiest {decades.min():.2f}; true {long_run:.2f}")
assert 0.85 < decades.std() / (larger * formula) < 1.25 and round(larger, 2) == 1.44

# %% [markdown] lang="en"
# It matters: the deviation is 1.5 times the formula's. (A deviation of 200 draws is itself known to 5 percent,
# $1/\sqrt{2\cdot 200}$.) Here is why. A shock of one percent moves $s$, and what $s$ then adds to the coming days sums
# up to $a\sqrt{1-\lambda^2}/(1-\lambda) = 0.44$ percent more. So over years, sums vary 1.44 times as much as if days
# were independent. (Lo 2002 has a formula for dependent days, too.) From here on we take *years* for independent
# pieces, and estimate the error from how their means vary. They nearly are independent, since the signal forgets within
# weeks.
#
# Holding the very same market for ten years gave anything from −1.69 to 1.49. Keep this in mind when you read that
# somebody's rule had a Sharpe ratio of 1 over three years: that is ± 0.6 if days are independent, and more if good days
# follow good ones. The next cell judges the 40 years in both ways.


# %%
def yearly(profits):
    """Mean profit of a day, for each whole year."""
    years = len(profits) // YEAR
    return profits[: years * YEAR].reshape(years, YEAR).mean(1)


def error_of_mean(profits):
    return yearly(profits).std(ddof=1) / math.sqrt(len(yearly(profits)))


def error_by_years(profits):
    """Of the Sharpe ratio."""
    return error_of_mean(profits) / profits.std() * math.sqrt(YEAR)


by_days, by_years = error_of_sharpe(hold), error_by_years(hold)
print(f"just hold, 40 years: {sharpe(hold):.2f} ± {by_days:.2f} by days, ± {by_years:.2f} by years")

# %% [markdown] lang="en"
# For the 40 years, too, the error by years is about 1.44 times the one by days.
#
# ## 3. The best rule there is
#
# We know $m_t$. Without costs the best rule is easy: hold 1 if $m_t > 0$, else −1. No rule with positions between −1
# and 1 has more expected profit.
#
# With costs it has to weigh: a turn costs 0.1 percent now, and what it gains depends on how long the signal will last.
# That is a problem of dynamic programming. The state is $s$ and the position held; $s$ moves on its own, by a known
# law. Write $V(q, s)$ for how much better than average it is to come into a day with position $q$ and signal $s$:
#
# $$V(q, s) + g = \max_p\;\big[\,p\,(\mu + a s) - c\,|p - q| + \mathrm{E}\,V(p, s')\,\big]$$
#
# Here $p$ is the position to take, $c$ the cost, $s'$ the signal of the next day, $\mathrm{E}$ the mean over what it
# may be, and $g$ the mean profit of a day. Start with $V = 0$, put the right side into the left one again and again,
# and it settles. On a grid of 241 values of $s$ this is a handful of lines:


# %%
POSITIONS = np.array([-1, 0, 1])
GRID = np.linspace(-6, 6, 241)


def best_rule(cost=COST, p=MARKET):
    """For each position held and each value of s on the grid, the position to take; and the mean profit of a day."""
    step, width = GRID[1] - GRID[0], math.sqrt(1 - p["memory"] ** 2)
    scale = width / math.sqrt(p["freedom"] / (p["freedom"] - 2))
    edges = np.concatenate([[-np.inf], GRID[:-1] + step / 2, [np.inf]])
    cumulated = stats.t.cdf((edges[None] - p["memory"] * GRID[:, None]) / scale, p["freedom"])
    chances = np.diff(cumulated)  # (from, to)
    gain = POSITIONS[:, None] * (p["drift"] + p["signal"] * GRID)  # (position, s)
    price = cost * abs(POSITIONS[:, None] - POSITIONS)  # (held, taken)
    value = np.zeros((3, len(GRID)))
    for _ in range(400):
        options = (gain + value @ chances.T)[None] - price[..., None]  # (held, taken, s)
        mean_profit = options.max(1)[0, 0] - value[0, 0]
        value = options.max(1) - options.max(1)[0, 0]
    return POSITIONS[options.argmax(1)], mean_profit


# %%
policy, promised = best_rule()
for held, row in zip(POSITIONS, policy, strict=True):
    changes = np.flatnonzero(np.diff(row))
    turns = ", ".join(
        f"{row[i + 1]:+d} above {1e4 * (MARKET['drift'] + MARKET['signal'] * GRID[i]):+.1f}" for i in changes
    )
    print(f"holding {held:+d}: {row[0]:+d}, {turns} (predictable part in 1/100 percent)")


# %% [markdown] lang="en"
# Read the first line: who bets on a fall turns only when the predictable part is clearly positive. And the third: who
# is in turns only when it is clearly negative. Between them lies a band in which one keeps what one has. It comes out
# of the equation by itself. (Who is in waits a little longer, since the drift is on that side. The second line is
# needed on the first day only: from 1 or −1 nobody goes back to 0.)
#
# Every forecaster below uses this same policy: it takes its *forecast* of the predictable part for the truth and looks
# up what to do. So forecasters differ in their forecasts only. The table below counts what is *traded* in units of
# one's money: a turn is 2. Profits are in 1/100 percent.


# %%
def positions(forecasts, policy=policy):
    """What to hold on each day, from what was forecast for it the evening before."""
    places = np.rint((forecasts - MARKET["drift"]) / MARKET["signal"] / (GRID[1] - GRID[0])).astype(int) + 120
    held, found = 0, np.empty(len(forecasts), int)
    for t, place in enumerate(places.clip(0, 240)):
        held = found[t] = policy[held + 1, place]
    return found


def profits(held, returns, cost=COST):
    return held * returns - cost * abs(np.diff(held, prepend=0))


# %%
def told(name, forecasts):
    """Prints what a forecast is worth on the days that we judge by. Returns its daily profits."""
    held = positions(forecasts)
    found = profits(held, hold)
    per_year = abs(np.diff(held)).sum() / len(held) * YEAR
    right = np.corrcoef(forecasts, true)[0, 1]
    print(
        f"{name:22} Sharpe {sharpe(found):5.2f} ± {error_by_years(found):.2f}   {1e4 * found.mean():5.2f} a day   "
        f"{per_year:3.0f} traded a year   correlation with the truth {right:.2f}"
    )
    return found


true = mean[test]
best = told("knows the generator", true)
print(f"promised by the equation: {1e4 * promised:.2f} a day (in 1/100 percent)")
assert abs(best.mean() - promised) < 3 * error_of_mean(best)
print(f"just hold: {1e4 * hold.mean():.2f} a day; without costs the best would be {1e4 * abs(true).mean():.2f}")

# %% [markdown] lang="en"
# The equation promised a mean profit of 7.16. On 10,000 days that it has never seen it was 6.84, and ± 0.22 of a Sharpe
# ratio is ± 1.4 here: right within its error. So this is the ceiling: with positions between −1 and 1, nobody who does
# not know the next day's noise can *expect* more profit in this market. (More *Sharpe* is possible, by betting less on
# wild days. So we compare profits.)
#
# ## 4. Two forecasts
#
# **Linear.** Tomorrow's return from the last 20, by least squares: 20 coefficients and a constant (an *autoregression*,
# AR). One call of numpy does it.
#
# **A transformer.** The course's small GPT, with three changes. It reads numbers, not words: in place of the
# embedding's table stands a matrix that takes a day's return and its size, without the sign. It gives
# three numbers for the next day, in place of a score for each word: a mean, and two quantiles that section 7 will need.
# And its loss fits these numbers.
# Blocks and causal mask stay, and so does the plan, but for the two layers that were replaced. With the mask, each
# position of a row forecasts the next day from its own day and those before, so a row of 64 days is 64 tasks. (A
# *position* is a place in the row here, as in [02a](02a_language_models.ipynb), and not what a rule holds.)


# %%
class Days(nn.Module):
    """(rows, days, 2) -> (rows, days, width): in the place of the embedding of tokens."""

    def __init__(self, config):
        super().__init__()
        self.read, self.position = nn.Linear(2, config.width), nn.Embedding(config.context, config.width)

    def forward(self, days):
        return self.read(days) + self.position.weight[: days.size(1)]


# %%
CONTEXT = 64
PLAN = {layer: style for layer, style in minipar.model.GPT.tp_plan.items() if layer not in ("embed.token", "head")}


def forecaster(seed=0):
    torch.manual_seed(seed)
    config = Config(context=CONTEXT, depth=2, width=32, heads=4)
    model = minipar.gpt(config)
    model.embed, model.head = Days(config), nn.Linear(config.width, 3)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        model.embed.position.weight.mul_(0.1)
        model.head.weight.mul_(0.1)
        model.head.bias.copy_(torch.tensor([0.0, -1.5, -2.5]))  # percent: about where the answers are
    return model.double()


def features(returns):
    percent = torch.tensor(100 * returns)
    return torch.stack([percent, percent.abs()], -1)


print(f"{sum(p.numel() for p in forecaster().parameters()):,} parameters, against 21 of the linear model")

# %% [markdown] lang="en"
# For the mean the loss is the square of the error. For a quantile it is the **[pinball
# loss](../docs/glossary.md#pinball-loss)** (Koenker and Bassett 1978). Let $q$ be the forecast of the 5 percent
# quantile and $\tau = 0.05$, `level` in the code. An error on one side costs more than on the other:
#
# $$\ell(r, q) = \max\big(\tau\,(r-q),\ (\tau-1)\,(r-q)\big)$$
#
# Why is it least at the quantile? Move $q$ up a little, by $\delta$. Returns above $q$ then cost $\tau\delta$ less,
# each; returns below cost $(1-\tau)\delta$ more. The two balance where $\tau\,P(r > q) = (1-\tau)\,P(r < q)$, which is
# where $P(r<q) = \tau$. **Check:** a grid of candidates, and the one that costs least.


# %%
LEVELS = (0.05, 0.01)


def pinball(returns, quantile, level):
    """Loss of a forecast quantile, for each day. Arrays or tensors."""
    above = returns - quantile
    return level * above - above * (above < 0)


candidates = np.linspace(-0.05, 0, 501)
for level in LEVELS:
    costs = [pinball(returns, q, level).mean() for q in candidates]
    cheapest, quantile = candidates[np.argmin(costs)], np.quantile(returns, level)
    print(f"{level:.0%}: least loss at {cheapest:.4f}, quantile of the returns {quantile:.4f}")
    assert abs(cheapest - quantile) < 2e-4
assert pinball(1.0, 0.0, 0.05) == 0.05 and pinball(-1.0, 0.0, 0.05) == 0.95


def loss_of_forecasts(found, targets):
    """Half the square for the mean, pinball for the quantiles. Sum over all days, and their number."""
    losses = (found[..., 0] - targets) ** 2 / 2
    for i, level in enumerate(LEVELS, 1):
        losses = losses + pinball(targets, found[..., i], level)
    return losses.sum(), targets.numel()


# %% [markdown] lang="en"
# The two agree, up to the step of the grid, 0.0001. That was one quantile for all days. A model may give another one
# for each day, and the same reasoning holds for the days that look alike to it. So it learns the quantile of the *next*
# day, given what came before.
#
# Training as ever: on two data ranks, and on two tensor ranks. 300 steps of 32 rows, in float64; all rows from the
# first 20,000 days.


# %%
def learn(mesh, seed, days, targets, starts, rate=3e-3):
    """On a rank: train on rows that begin at these days. What the model is then, gradients of the first step."""
    model = parallelize(forecaster(seed), mesh, plan=PLAN, loss=loss_of_forecasts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    for step, first in enumerate(starts):
        for group in optimizer.param_groups:  # warm up, then less and less
            group["lr"] = rate * min(1, (step + 1) / 30) * (1 - step / len(starts))
        rows = first[:, None] + torch.arange(CONTEXT)
        model.step(days[rows], targets[rows])
        if step == 0:
            gradients = model.full_gradients()
        optimizer.step()
        optimizer.zero_grad()
    state = model.full_state_dict()
    return (state, gradients) if here().rank == 0 else None


# %%
def forecast(model, returns, first):
    """Three numbers for each day from `first` on, each from at least 32 days before it, and from nothing else."""
    half, last = CONTEXT // 2, len(returns) - 1
    starts = torch.arange(first - CONTEXT, last - half, half).clamp(max=last - CONTEXT)
    rows = starts[:, None] + torch.arange(CONTEXT)
    with torch.no_grad():
        found = model(features(returns)[rows])[:, half:]
    whole = torch.empty(len(returns), 3, dtype=torch.float64)
    for start, row in zip(starts.tolist(), found, strict=True):  # what is said at the end of a day is for the next one
        whole[start + half + 1 : start + CONTEXT + 1] = row
    return whole[first:].numpy() / 100


# %%
STEPS = 300


def trained_on(mesh, returns, seed=0):
    """The model, trained on the ranks; the gradients of its first step are compared with one process."""
    began = time.perf_counter()
    days = features(returns[:LEARN])
    inputs, targets = days[:-1], days[1:, 0]
    starts = torch.randint(0, len(targets) - CONTEXT, (STEPS, 32), generator=torch.Generator().manual_seed(seed))
    state, found = two.run(learn, mesh, seed, inputs, targets, starts)[0]
    model, rows = forecaster(seed), starts[0][:, None] + torch.arange(CONTEXT)
    total, count = loss_of_forecasts(model(inputs[rows]), targets[rows])
    (total / count).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max() for g in wanted.values())
    far = max((found[name] - g).abs().max() / largest for name, g in wanted.items()).item()
    print(f"{mesh}: {time.perf_counter() - began:.0f} s here, gradients {far:.0e} from one process")
    assert far < 1e-12
    model.load_state_dict(state)
    return model


models = {mesh: trained_on(mesh, returns) for mesh in (Mesh(dp=2), Mesh(tp=2))}
forecasts = {mesh: forecast(model, returns, LEARN) for mesh, model in models.items()}

# %%
one, other = forecasts.values()
print(f"the forecasts of the two layouts differ by {abs(one - other).max():.0e} at most")
assert abs(one - other).max() < 1e-9 and np.array_equal(positions(one[:, 0]), positions(other[:, 0]))

# %% [markdown] lang="en"
# The forecasts agree on both layouts, and so all of 10,000 positions are the same.
#
# **Before any profit, the look-ahead test.** A forecast for a day must not depend on that day, nor on later ones. This
# can be checked, for every model, by a knife: cut at a day, change the future, and see whether the past's forecasts
# move.


# %%
def autoregression(returns, days=20):
    """Least squares on the first LEARN days; forecasts from there on."""
    past = np.lib.stride_tricks.sliding_window_view(returns, days)[:-1]  # row i: days i to i + 19
    table, targets = np.column_stack([past, np.ones(len(past))]), returns[days:]
    weights = np.linalg.lstsq(table[: LEARN - days], targets[: LEARN - days], rcond=None)[0]
    return (table @ weights)[LEARN - days :]


def looks_ahead(forecasts_of, day=LEARN + 5000):
    """Do forecasts up to a day change, if that day and all later ones are other days?"""
    changed = np.concatenate([returns[:day], market(seed=99)[0][day:]])
    before, after = (forecasts_of(some)[: day - LEARN + 1] for some in (returns, changed))
    return bool(abs(before - after).max() > 1e-12)


def gpt_forecast(returns):
    return forecast(models[Mesh(dp=2)], returns, LEARN)[:, 0]


for name, forecasts_of in {"linear": autoregression, "GPT": gpt_forecast}.items():
    print(f"{name}: looks ahead: {looks_ahead(forecasts_of)}")
    assert not looks_ahead(forecasts_of)

# %% [markdown] lang="en"
# **Question.** Who earns more on the last 40 years, the linear model with 21 numbers or the GPT with tens of thousands?
# And which share of the best possible? (The cell also trains a second GPT, with another seed: other first weights,
# other rows in another order.)

# %%
prediction = None  # (who, share of the best)

again = forecast(trained_on(Mesh(dp=2), returns, seed=1), returns, LEARN)
print("you wrote:", prediction)
linear_forecast, gpt = autoregression(returns), gpt_forecast(returns)
earned = {
    "knows the generator": best,
    "linear, 20 days": told("linear, 20 days", linear_forecast),
    "GPT": told("GPT", gpt),
}
told("GPT, another seed", again[:, 0])
print(f"{'just hold':22} Sharpe {sharpe(hold):5.2f} ± {error_by_years(hold):.2f}   {1e4 * hold.mean():5.2f} a day")
difference = earned["linear, 20 days"] - earned["GPT"]
error = error_of_mean(difference)
print(f"linear minus GPT, day by day: {1e4 * difference.mean():+.2f} ± {1e4 * error:.2f}")
assert abs(difference.mean()) < 2 * error and max(some.mean() for some in earned.values()) == best.mean()
assert np.corrcoef(linear_forecast, true)[0, 1] > np.corrcoef(gpt, true)[0, 1]

# %% [markdown] lang="en"
# **The transformer does not beat the linear model.** By profits, 40 years are not enough to tell the two apart: the
# difference is far smaller than its error. By what only we can see, the correlation of the forecasts with the truth,
# the linear model is ahead, 0.82 against 0.73. It trades more, and pays for that: 83 times 0.05 percent a year are 1.6
# a day, and the GPT's 54 are 1.1. Before costs they earn 6.3 and 6.2. With them, both earn about twice as much as
# holding does, and 68 and 75 percent of the best.
#
# With another seed the GPT earns 4.3 a day, 0.9 less than with the first, and less than the linear model. That gap is
# wider than the one between the two models. So the profits of one training say little. The correlations say the same
# for both seeds: 0.73 and 0.68, each below the 0.82 of the linear model. (It is still one market.)
#
# The reason is most likely in the generator: its predictable part *is* nearly linear in past returns, with weights that
# fall off smoothly. Least squares has 21 numbers to find among 20,000 days. The GPT has a thousand times as many, in 99
# percent noise, and must discover that it should add things up. It could do more, in principle: the generator adds up
# returns *divided by their day's volatility*, which no linear model can do. That did not make up for the rest.
#
# The next figure sums the profits up. For a dozen years the GPT keeps level with the rule that knows everything, or is
# above it. Nobody can expect that, so it is luck: look how long luck can last.

# %%
drawing, (panel,) = viz.figure(8, 2.8)
looks = {"knows the generator": (viz.INK, ":"), "linear, 20 days": (viz.PALETTE[1], "-"), "GPT": (viz.PALETTE[5], "--")}
for (name, some), (color, style) in zip(earned.items(), looks.values(), strict=True):
    panel.plot(np.arange(len(some)) / YEAR, 100 * some.cumsum(), style, color=color, lw=1.3, label=name)
panel.plot(np.arange(len(hold)) / YEAR, 100 * hold.cumsum(), color=viz.PALETTE[7], lw=1.3, label="just hold")
panel.set(xlabel="year", ylabel="percent, summed up")
panel.legend(frameon=False, fontsize=9)
alt = (
    "Profits summed up over 40 years. Who knows the generator ends highest, then come the GPT, the linear model, and "
    "holding. Until about year 15 the GPT is level with who knows the generator, and now and then above; the linear "
    "model lies a little below these two, and close to holding. All have stretches of years in which they lose."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# ## 5. Another market
#
# So let us make a market in which a linear model must fail. In calm times the signal works as before. In wild times it
# works the other way around: what rose, falls. On average, little that is linear is left. The signal is twice as strong
# here, so that there is something to see: four percent of the variance in place of one.
#
# **Question.** Who forecasts better now? The GPT sees the size of past returns. It would have to find out on its own
# that the sign of the signal depends on it. (We leave costs out: the policy above is not the right one for this market,
# and without costs the best is to hold 1 or −1, as the forecast's sign says.)

# %%
prediction = None

CALM = 0.7e-4  # of the variance: below it the signal has its usual sign


def turning(s, variance):
    return s if variance < CALM else -s


turned, turned_mean, *_ = market(seed=1, rule=turning, p=MARKET | {"signal": 0.002})
turned_model = trained_on(Mesh(dp=2), turned)
others = {
    "knows the generator": turned_mean[test],
    "linear, 20 days": autoregression(turned),
    "GPT": forecast(turned_model, turned, LEARN)[:, 0],
}
print("you wrote:", prediction)
seen = {}
for name, some in others.items():
    gained = np.sign(some) * turned[test]
    seen[name] = np.corrcoef(some, turned_mean[test])[0, 1]
    right = f"correlation with the truth {seen[name]:.2f}"
    print(f"{name:22} Sharpe, no costs {sharpe(gained):5.2f} ± {error_by_years(gained):.2f}   {right}")
assert seen["GPT"] > seen["linear, 20 days"] + 0.1

# %% [markdown] lang="en"
# Here the GPT is ahead. What the linear model earns cannot be told from nothing, and the GPT has 1.57 of the 2.20 that
# are possible. So "which model is better" has no answer without "in which market", and of a real market nobody knows
# which one it is. What one can do is what we did: have both, judge both by later days, and demand more of the one with
# more parameters.
#
# ## 6. Three ways to fool yourself
#
# Profits that are too good have a cause. These three are common, and here they are, planted one by one.
#
# ### The future in a feature
#
# A friend smooths the returns first, "to get rid of the noise": each day's is replaced by the mean of seven days. The
# call is the usual one, with the window *centered* on the day. Then they fit the same linear model.
#
# **Question.** What Sharpe ratio does the friend report?

# %%
prediction = None


def smoothed(returns, days, centered):
    """Means over so many days: around the day, or up to it."""
    whole = np.convolve(returns, np.ones(days) / days)
    return whole[days // 2 : len(returns) + days // 2] if centered else whole[: len(returns)]


def on_smoothed(returns, centered):
    """The linear model, with smoothed returns to forecast from."""
    clean, days = smoothed(returns, 7, centered), 20
    past = np.lib.stride_tricks.sliding_window_view(clean, days)[:-1]
    table, targets = np.column_stack([past, np.ones(len(past))]), returns[days:]
    weights = np.linalg.lstsq(table[: LEARN - days], targets[: LEARN - days], rcond=None)[0]
    return (table @ weights)[LEARN - days :]


print("you wrote:", prediction)
for centered in (True, False):
    found = told("centered on the day" if centered else "up to the day", on_smoothed(returns, centered))
    print(f"  looks ahead: {looks_ahead(lambda some, c=centered: on_smoothed(some, c))}")
    assert looks_ahead(lambda some, c=centered: on_smoothed(some, c)) == centered
    assert (found.mean() > 3 * best.mean()) == centered
print(f"the best possible: {1e4 * best.mean():.2f} a day")

# %% [markdown] lang="en"
# That is what an impossible profit looks like: eight times what the best rule earns that knows the generator. And with
# the predictable part these forecasts have hardly anything to do: the correlation is 0.17. They know the noise.
# Nothing crashed, no line of code is wrong by itself, and the days that it is judged by come after those that it
# learned from. The knife finds it. With the same seven days *up to* the day, the knife is content, and the friend earns
# about what we did. In a real market there is no ceiling to compare with, so remember the size. Our rule of thumb: a
# yearly Sharpe ratio above 3 asks for the knife first, and for champagne later.
#
# ### Shuffled days
#
# Another friend forecasts the *next 20 days* together, from what all like to look at: the mean and the deviation of the
# last 20, 60 and 120 days. Rows are shuffled, then divided: two thirds to learn from, a third to judge by. The model
# looks up the five most similar situations, and takes the mean of what followed.
#
# **Question.** Which share of the variance of the next 20 days can be explained at best? And what does the friend find?
# The signal shrinks to 0.9 of itself each day, so over 20 days it adds up to $a\,s\,(1-0.9^{20})/0.1 = 8.8\,a\,s$.

# %%
prediction = None  # (at best, friend)


def explained(by_time, ahead=20, rows=6000):
    """Share of the variance of the next days that the look-up explains."""
    windows = [np.lib.stride_tricks.sliding_window_view(returns[120 - k :], k)[:rows] for k in (20, 60, 120)]
    table = np.column_stack([f(w, axis=1) for f in (np.mean, np.std) for w in windows])
    table /= table.std(0)
    future = np.lib.stride_tricks.sliding_window_view(returns[120:], ahead)[:rows].sum(1)
    order, cut = np.random.default_rng(0).permutation(rows), 2 * rows // 3
    learned, judged = order[:cut], order[cut:]
    if by_time:  # and no row whose future overlaps with what was learned
        learned, judged = np.arange(cut), np.arange(cut + ahead, rows)
    model = KNeighborsRegressor(5).fit(table[learned], future[learned])
    return model.score(table[judged], future[judged])


# %%
def adds_up(days):
    """What an s of 1 adds to the returns of so many days to come."""
    return MARKET["signal"] * (1 - MARKET["memory"] ** days) / (1 - MARKET["memory"])


later = adds_up(np.arange(20)) * math.sqrt(1 - MARKET["memory"] ** 2)  # what a shock adds to the rest of the 20 days
variance = adds_up(20) ** 2 + ((math.sqrt(MARKET["variance"]) + later) ** 2).sum()
at_best = adds_up(20) ** 2 / variance
print(f"you wrote: {prediction} - at best about {at_best:.1%}")
print(f"20 days together vary {variance / (20 * MARKET['variance']):.2f} times as much as independent ones")
shuffled, by_time = explained(False), explained(True)
print(f"shuffled {shuffled:.0%}, by time {by_time:.0%}")
assert by_time < 0 < 0.02 < at_best < 0.03 < 0.5 < shuffled

# %% [markdown] lang="en"
# Most of the future "explained", and by time less than nothing (worse than always saying the mean). At best it is 2.4
# percent: the square of what $s$ adds, over the variance of the 20 days together. That variance is 1.60 times that of
# 20 *independent* days, since good days follow good ones, as in section 2. Who forgets that has 4 percent. (The cell
# takes the volatility for steady.)
#
# A row and the next day's row have 19 of 20 future days in common, and nearly the same past. Shuffled, a row's twins
# are among those that the model learned from: [leakage](../docs/glossary.md#leakage), as the files of docstrings in
# [04c](04c_faq.ipynb). (Twins probably explain the −88 percent, too. The five most similar situations are mostly days
# of one and the same stretch. Their mean is then hardly less noisy than a single future, and a guess that varies as
# much as the target, and has nothing to do with it, scores −100 percent.) So **divide by time**, and leave a gap as
# long as the future that is forecast.
#
# ### The best of many
#
# A third friend tried 200 rules on ten years, and shows the best one. In truth each rule tosses a coin every evening,
# in a market where nothing at all can be earned.
#
# **Question.** What Sharpe ratio has the best one on its ten years? And on the next ten?

# %%
prediction = None  # (first ten years, next ten)

draw = np.random.default_rng(3)
nothing = returns[test][:5040] - mean[test][:5040]  # the same days without their predictable part
coins = draw.choice([-1, 1], (200, 5040))
ratios = np.array([[sharpe(coin[half] * nothing[half]) for half in (slice(2520), slice(2520, 5040))] for coin in coins])
winner = ratios[:, 0].argmax()
print(f"you wrote: {prediction} - {ratios[winner, 0]:.2f}, and then {ratios[winner, 1]:.2f}")
one_in_200 = stats.norm.ppf(1 - 1 / 200) / math.sqrt(10)
print(f"the formula of section 2: one rule in 200 is above {one_in_200:.2f} by luck")
assert ratios[winner, 0] > 0.7 and abs(ratios[winner, 1]) < 0.65

# %% [markdown] lang="en"
# Nobody cheated, and the first ten years are worth nothing. The next ten are the honest ones: 0.38, with a standard
# error of 0.32, cannot be told from zero. (Nothing moves the days in this market but noise, so the formula of section 2
# holds.) Who chooses by the days that are shown has used them up. Bailey and López de Prado 2014 show how to correct a
# ratio for the number of rules tried, if that number is told. No cell of sections 4, 5 and 7 chooses anything by the
# last 10,000 days. Without that, they could not be believed. (Do you change a number in section 4 because of what its
# table says? Then you have begun to use these days up.)
#
# ## 7. Risk: how much can be lost in a day?
#
# **[Value at risk](../docs/glossary.md#value-at-risk)** (VaR) at 1 percent is a loss that is exceeded on one day in a
# hundred: minus the 1 percent quantile of the next day's return. From 1996 on, banks could set their capital for market
# risk by such numbers (Basel Committee 1996). The later rules take the mean of the losses beyond a quantile, the
# *expected shortfall*, and still count exceedances of VaR to check a model (Basel Committee 2019). Forecasts that we
# have:
#
# - **historical simulation**: the quantile of the last 500 days. It needs no model, and was by far the most popular
#   method among the banks that Pérignon and Smith 2010 looked at;
# - **GARCH**, with its parameters fitted to the first 20,000 days by maximum likelihood (those under which these
#   days are least surprising): whoever fits it has guessed the right family, with four numbers to find. It knows of no
#   signal: its mean is the same on every day;
# - **our GPT**: its second and third number, learned by the pinball loss, from both seeds. It was told
#   nothing of volatility;
# - **the truth**: $m_t + \sigma_t$ times the quantile of Student's t.


# %%
FIRST = returns[:LEARN]


def variances(returns, shock, persistence, long_run):
    """GARCH(1,1): of each day, from the days before it. A linear filter over the squares."""
    base = (1 - shock - persistence) * long_run
    pushed = base + shock * np.concatenate([[long_run], returns[:-1] ** 2])
    return lfilter([1], [1, -persistence], pushed, zi=[persistence * long_run])[0]


def unlikely(parameters):
    """Minus the logarithm of the likelihood of the first days."""
    shock, persistence, long_run, freedom = parameters
    if min(shock, persistence) < 0 or shock + persistence >= 0.999 or long_run <= 0 or freedom <= 2.1:
        return np.inf
    spread = np.sqrt(variances(FIRST, shock, persistence, long_run * 1e-4) * (freedom - 2) / freedom)
    return -(stats.t.logpdf((FIRST - FIRST.mean()) / spread, freedom) - np.log(spread)).sum()


fitted = minimize(unlikely, [0.05, 0.9, 1.0, 8.0], method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-2}).x
print("fitted: shock {:.3f}, persistence {:.3f}, variance {:.2f}e-4, freedom {:.1f}".format(*fitted))


# %%
def quantile_of_noise(level, freedom):
    return stats.t.ppf(level, freedom) * math.sqrt((freedom - 2) / freedom)


def quantiles(i, level):
    """Forecasts of a quantile for each day that we judge by."""
    shock, persistence, long_run, freedom = fitted
    deviation = np.sqrt(variances(returns, shock, persistence, long_run * 1e-4))
    last = np.lib.stride_tricks.sliding_window_view(returns[LEARN - 500 : -1], 500)
    return {
        "historical simulation": np.quantile(last, level, axis=1),
        "GARCH, fitted": (FIRST.mean() + deviation * quantile_of_noise(level, freedom))[test],
        "GPT": forecasts[Mesh(dp=2)][:, i],
        "GPT, another seed": again[:, i],
        "the truth": (mean + volatility * quantile_of_noise(level, MARKET["freedom"]))[test],
    }


risk = {level: quantiles(i, level) for i, level in enumerate(LEVELS, 1)}
assert all(len(some) == len(hold) for cases in risk.values() for some in cases.values())

# %% [markdown] lang="en"
# The fit is close to the truth, which is 0.08, 0.90, 1.00 and 5.
#
# ### Counted
#
# If a forecast is right, a day is an **exceedance** with probability $p$, whatever happened before. (An exceedance is a
# day with a return below the forecast quantile.) Two tests ask the two halves of that sentence.
#
# **As many as there should be?** Of $n$ days, $x$ were exceedances. Kupiec 1995 compares the likelihood of that under
# $p$ with the one under the share that was seen, $x/n$:
#
# $$\mathrm{LR} = 2\ln\frac{(1-x/n)^{n-x}\,(x/n)^x}{(1-p)^{n-x}\,p^x}$$
#
# If $p$ is right, LR is about the square of a standard normal number, so it is above 3.84 in 5 of 100 cases.
#
# **Independent of yesterday?** Christoffersen 1998: count how often an exceedance follows one, and how often it follows
# a day without. The likelihood ratio of "two chances" against "one chance for both" behaves in the same way. (It looks
# one day back, and no further.)


# %%
def log_likelihood(hits, days, chance):
    """Of so many hits in so many days."""
    return sum(k * math.log(q) for k, q in ((hits, chance), (days - hits, 1 - chance)) if k)


def chance_of(ratio):
    """The chance of a likelihood ratio that large or larger, if there is nothing to find."""
    return math.erfc(math.sqrt(max(ratio, 0) / 2))


def kupiec(hits, days, level):
    """The ratio of Kupiec's test, and its chance."""
    ratio = 2 * (log_likelihood(hits, days, hits / days) - log_likelihood(hits, days, level))
    return ratio, chance_of(ratio)


def christoffersen(exceeded):
    """The ratio of the test for independence of the day before, and its chance."""
    before, after = exceeded[:-1], exceeded[1:]
    groups = [after[before], after[~before]]
    split = sum(log_likelihood(int(g.sum()), len(g), g.mean()) for g in groups if len(g))
    ratio = 2 * (split - log_likelihood(int(after.sum()), len(after), after.mean()))
    return ratio, chance_of(ratio)


# %% [markdown] lang="en"
# **By hand first.** 250 days, about a trading year, at 1 percent: 2.5 exceedances are expected. With 5 of them, is the
# forecast refuted? And with 7? Guess the largest number that passes at 5 percent.

# %%
prediction = None  # the largest number

passing = [x for x in range(30) if kupiec(x, 250, 0.01)[1] > 0.05]
print(f"you wrote: {prediction} - {passing}")
by_hand = 2 * (245 * math.log(245 / 250 / 0.99) + 5 * math.log(5 / 250 / 0.01))
assert math.isclose(kupiec(5, 250, 0.01)[0], by_hand) and max(passing) == 6
noise = np.random.default_rng(0)
refused = np.mean([kupiec(x, 10_000, 0.01)[1] < 0.05 for x in noise.binomial(10_000, 0.01, 2000)])
print(f"of 2,000 right forecasts over 10,000 days the test refuses {refused:.1%}")
assert 0.035 < refused < 0.065

# %% [markdown] lang="en"
# With a year of days, twice as many exceedances as promised still pass. The test is weak where days are few, and no
# verdict is not a good verdict. Note that 0 does not pass: it has a chance of $0.99^{250}$, 8 percent, but the
# likelihood ratio is 5.0. "About the square of a standard normal number" is rough where so few are expected. We have
# 10,000 days, and there the test refuses right forecasts about as often as it should, in 5 of 100 cases.
#
# **Question.** Which of the five forecasts fail, and in which of the two tests?

# %%
prediction = None

verdicts = {}
print("you wrote:", prediction)
for level, cases in risk.items():
    for name, quantile in cases.items():
        exceeded = hold < quantile
        count, follow = kupiec(int(exceeded.sum()), len(exceeded), level)[1], christoffersen(exceeded)[1]
        losses = 1e4 * pinball(hold, quantile, level)
        verdicts[level, name] = count, follow, losses
        tested = f"Kupiec {count:.2g}, Christoffersen {follow:.2g}"
        seen_days = f"exceeded {exceeded.sum():3} of {level * len(exceeded):.0f}"
        print(f"{level:.0%}  {name:21}  {seen_days}  loss {losses.mean():5.2f}  {tested}")
for level in LEVELS:
    loss = {name: verdicts[level, name][2].mean() for name in risk[level]}
    assert loss["the truth"] < loss["GARCH, fitted"] < loss["GPT"] < loss["historical simulation"]
    assert max(verdicts[level, "historical simulation"][:2]) < 0.05 < min(verdicts[level, "the truth"][:2])
    assert loss["GPT"] - loss["the truth"] < (loss["historical simulation"] - loss["the truth"]) / 4
assert verdicts[0.05, "GPT"][0] < 0.05 < verdicts[0.01, "GPT"][0]

# %% [markdown] lang="en"
# Are these differences of losses more than luck? All forecasts are judged by the same days, so take the difference day
# by day, and its error by years, as with the profits: wild days come together, and then the days are not independent.

# %%
for level in LEVELS:
    of_gpt = verdicts[level, "GPT"][2]
    for name in risk[level]:
        more = verdicts[level, name][2] - of_gpt
        if name != "GPT":
            print(f"{level:.0%}  loss of {name:22} minus the GPT's {more.mean():+.3f} ± {error_of_mean(more):.3f}")

# %%
drawing, (panel,) = viz.figure(8, 3)
some = slice(3000, 3600)
panel.plot(100 * hold[some], lw=0.5, color=viz.PALETTE[7], label="returns")
looks = {"historical simulation": (viz.PALETTE[1], "-"), "GPT": (viz.PALETTE[5], "-"), "the truth": (viz.INK, ":")}
for name, (color, style) in looks.items():
    panel.plot(100 * risk[0.01][name][some], style, color=color, lw=1.3, label=name)
panel.set(xlabel="day", ylabel="percent", ylim=(-6.5, 8))
panel.legend(frameon=False, ncols=4, loc="upper center", fontsize=9)
alt = (
    "Daily returns over 600 days and forecasts of their 1 percent quantile. The truth moves with every wild stretch, "
    "the GPT's forecast follows it closely, the historical one is a staircase that comes late."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# - **Historical simulation** fails both tests at both levels: it is exceeded too often, and in clusters, when it hurts.
#   It learns of a wild stretch only when enough of its days have passed, and then stays too careful for two years.
# - **The GPT** follows the volatility closely. Its loss is below the historical one's by 1.00 ± 0.21 at 5 percent and
#   0.50 ± 0.11 at 1 percent, and far nearer to the truth's. Nobody told it that there is a volatility; the pinball loss
#   and the size of past returns were enough. At 1 percent it passes. At 5 percent it is a bit too careful, 439
#   exceedances in place of 500, and with 10,000 days Kupiec's test sees that. The second seed says the same: 440
#   exceedances, and a difference of losses within its error. A percent of signal is hard to find; volatility is loud.
# - **GARCH, fitted,** passes everywhere and has a smaller loss still, with four numbers: by 0.11 ± 0.05 at 5 percent,
#   about twice the error, and by 0.08 ± 0.05 at 1 percent, which is too little to be sure. It is the right family, by
#   our choice. In a real market nobody tells you the family, and then it is less clear who wins.
# - **The truth** passes, and has the least loss. It still loses a lot on one day in a hundred: the best forecast of a
#   risk does not make it smaller.
#
# In the figure, about day 400 the returns turn wild: the truth and the GPT are at −5 percent within days, and the
# historical forecast has hardly moved.
#
# The table has twenty tests, and each refuses a right forecast once in twenty. So the 0.034 would not say much alone.
# The other three of historical simulation are far smaller.
#
# Neither test is enough. A forecast can be exceeded as often as it should, and be useless; the GPT's 5 percent are
# refused, and are much better than the historical ones. The loss compares; the tests find what to mend.
#
# ## What you have now
#
# - **A ceiling.** Where the generator is known, the best rule is computable, with costs. What is above it is a leak, or
#   luck.
# - **Errors of Sharpe ratios**: one over the root of the years. Three years say nearly nothing.
# - **Equal results on two layouts**, to the last position held. A trading rule is no exception to the law.
# - **The knife**: change the future, and see whether forecasts of the past move. It finds a look-ahead between returns
#   and forecasts, wherever you cut. It does not find rows that were shuffled, nor the best of many.
# - **Time** divides what is learned from what judges, with a gap; and what has chosen may not judge.
# - **Quantiles** by the pinball loss, **exceedances** by two tests.
# - The transformer did not beat 21 numbers where the truth was linear, nor 4 where the truth was GARCH. It was ahead
#   where the truth was neither and nobody had written a model for it.
#
# ## Three questions to take along
#
# 1. A fund shows a Sharpe ratio of 1.2 over five years. What is its standard error, and what else do you ask?
# 2. A feature is divided by its standard deviation over the whole data set. Is that a look-ahead?
# 3. In 500 days your VaR at 1 percent was exceeded 5 times, all in one week. What do the two tests say?
#
# <details><summary>Answers</summary>
#
# 1. 1/√5 = 0.45. How many others there were that are not shown, and when the rule was fixed.
# 2. Yes: the deviation knows the days to come. Mostly a small one, but the knife finds it: its days after the cut are
#    in the deviation. Take it from the days before.
# 3. Kupiec: exactly as many as promised. Christoffersen: hardly by chance.
#
# </details>

# %%
assert round(1 / math.sqrt(5), 2) == 0.45 and kupiec(5, 500, 0.01)[0] == 0  # the answers above
week = np.zeros(500, bool)
week[100:105] = True
assert christoffersen(week)[1] < 1e-4

# %% [markdown] lang="en"
# ## References
#
# - Bailey and López de Prado 2014, *The Deflated Sharpe Ratio*, Journal of Portfolio Management 40(5)
# - Basel Committee on Banking Supervision 1996, *Amendment to the Capital Accord to Incorporate Market Risks*
# - Basel Committee on Banking Supervision 2019, *Minimum capital requirements for market risk*
# - Bollerslev 1986, *Generalized autoregressive conditional heteroskedasticity*, Journal of Econometrics 31
# - Campbell and Thompson 2008, *Predicting Excess Stock Returns Out of Sample: Can Anything Beat the Historical
#   Average?*, Review of Financial Studies 21
# - Christoffersen 1998, *Evaluating Interval Forecasts*, International Economic Review 39
# - Koenker and Bassett 1978, *Regression Quantiles*, Econometrica 46
# - Kupiec 1995, *Techniques for Verifying the Accuracy of Risk Measurement Models*, Journal of Derivatives 3
# - Lo 2002, *The Statistics of Sharpe Ratios*, Financial Analysts Journal 58
# - Pérignon and Smith 2010, *The level and quality of Value-at-Risk disclosure by commercial banks*, Journal of Banking
#   and Finance 34
# - Sharpe 1966, *Mutual Fund Performance*, Journal of Business 39
#
# **Next:** [Tools](07_tools.ipynb), the same step in the libraries that others use.

# %%
two.close()
