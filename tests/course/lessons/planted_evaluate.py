"""Answers to the exercises of lesson 05, as learners write them."""

import itertools
from math import exp, prod

import numpy as np
import torch
from sacrebleu.metrics import BLEU

# --- 05.stop


def stop_with_index(emitted, stop_ids, limit):
    places = [emitted.index(stop) for stop in stop_ids if stop in emitted[:limit]]
    end = min(places, default=min(limit, len(emitted)))
    return emitted[:end], bool(places)


def below_the_limit(emitted, stop_ids, limit):
    answer, _ = stop_with_index(emitted, stop_ids, limit)
    return answer, len(answer) < limit


def stop_with_arrays(emitted, stop_ids, limit):
    ids = np.array(emitted[:limit])
    is_stop = np.isin(ids, stop_ids)
    end = int(is_stop.argmax()) if is_stop.any() else len(ids)
    return torch.tensor(emitted[:end]), bool(is_stop.any())


def stop_with_takewhile(emitted, stop_ids, limit):
    within = emitted[:limit]
    kept = tuple(itertools.takewhile(lambda token: token not in set(stop_ids), within))
    return [kept, len(kept) != len(within)]


def stop_kept(emitted, stop_ids, limit):
    ids = []
    for token in emitted[:limit]:
        ids.append(token)
        if token in stop_ids:
            return ids, True
    return ids, False


def one_stop(emitted, stop_ids, limit):
    return stop_with_index(emitted, stop_ids[:1], limit)


def no_limit(emitted, stop_ids, limit):
    kept = list(itertools.takewhile(lambda token: token not in stop_ids, emitted))
    return kept, len(kept) < len(emitted)


def always_stopped(emitted, stop_ids, limit):
    return stop_with_index(emitted, stop_ids, limit)[0], True


def to_the_last(emitted, stop_ids, limit):
    for i in reversed(range(min(limit, len(emitted)))):
        if emitted[i] in stop_ids:
            return emitted[:i], True
    return emitted[:limit], False


# --- 05.clipped_precision


def grams(text, n):
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def clipped_with_removal(output, reference, n):
    left, matched = grams(reference, n), 0
    for gram in grams(output, n):
        if gram in left:
            left.remove(gram)
            matched += 1
    return [matched, len(grams(output, n))]


def clipped_with_count(output, reference, n):
    ours, theirs = grams(output, n), grams(reference, n)
    return np.array([sum(min(ours.count(g), theirs.count(g)) for g in set(ours)), len(ours)])


def clipped_by_sacrebleu(output, reference, n):
    scored = BLEU(tokenize="none").corpus_score([output], [[reference]])
    return scored.counts[n - 1], scored.totals[n - 1]


def clipped_once(output, reference, n):
    return len(set(grams(output, n)) & set(grams(reference, n))), len(set(grams(output, n)))


def one_short(output, reference, n):
    ours, theirs = ([tuple(w[i : i + n]) for i in range(len(w) - n)] for w in (output.split(), reference.split()))
    return sum(min(ours.count(g), theirs.count(g)) for g in set(ours)), len(ours)


# --- 05.bleu


def bleu(answers, combine=lambda p: prod(p) ** 0.25, penalty=lambda c, r: 1 if c > r else exp(1 - r / c)):
    matched, total = (np.sum([answer[k] for answer in answers], axis=0) for k in (0, 1))
    c, r = (sum(answer[k] for answer in answers) for k in (2, 3))
    return 100 * combine(matched / total) * penalty(c, r)


def bleu_with_logs(answers):
    stats = torch.tensor([[*m, *t, c, r] for m, t, c, r in answers], dtype=torch.float64).sum(0)
    penalty = torch.clamp(1 - stats[9] / stats[8], max=0)
    return 100 * torch.exp(torch.log(stats[:4] / stats[4:8]).mean() + penalty)


def bleu_by_sacrebleu(answers):
    def added(k):
        return [sum(column) for column in zip(*(answer[k] for answer in answers), strict=True)]

    words, wanted = sum(a[2] for a in answers), sum(a[3] for a in answers)
    return BLEU.compute_bleu(added(0), added(1), words, wanted, smooth_method="none").score


def mean_of_scores(answers):
    return np.mean([bleu([answer]) for answer in answers])


def mean_of_precisions(answers):
    precisions = np.mean([np.array(m) / np.array(t) for m, t, _, _ in answers], axis=0)
    c, r = (sum(answer[k] for answer in answers) for k in (2, 3))
    return 100 * precisions.prod() ** 0.25 * min(1, exp(1 - r / c))


# --- 05.paired_bootstrap


def gains(first, second, samples):
    a, b = np.array(first), np.array(second)
    return np.array([np.subtract(*(100 * x[s, 0].sum() / x[s, 1].sum() for x in (b, a))) for s in map(list, samples)])


def p_with_arrays(first, second, samples):
    values, observed = gains(first, second, samples), gains(first, second, [range(len(first))])[0]
    return (np.sum(np.abs(values - values.mean()) >= abs(observed)) + 1) / (len(samples) + 1)


def p_with_tensors(first, second, samples):
    values = torch.tensor(gains(first, second, [*samples, range(len(first))]))
    far = (values[:-1] - values[:-1].mean()).abs() >= values[-1].abs()
    return (far.sum() + 1) / torch.tensor(len(samples) + 1, dtype=torch.float64)


def p_with_loops(first, second, samples):
    def score(counts, sample):
        matched = total = 0
        for question in sample:
            matched, total = matched + counts[question][0], total + counts[question][1]
        return 100 * matched / total

    observed = score(second, range(len(second))) - score(first, range(len(first)))
    values = [score(second, s) - score(first, s) for s in samples]
    middle, found = sum(values) / len(values), 1
    for value in values:
        found += value - middle >= abs(observed) or middle - value >= abs(observed)
    return found / (1 + len(values))


def p_one_sided(first, second, samples):
    values, observed = gains(first, second, samples), gains(first, second, [range(len(first))])[0]
    return (sum(values - values.mean() >= abs(observed)) + 1) / (len(samples) + 1)


def p_not_centered(first, second, samples):
    values, observed = gains(first, second, samples), gains(first, second, [range(len(first))])[0]
    return (sum(abs(values) >= abs(observed)) + 1) / (len(samples) + 1)


def p_of_distinct(first, second, samples):
    return p_with_arrays(first, second, [list(dict.fromkeys(sample)) for sample in samples])


def p_unpaired(first, second, samples):
    a, b = np.array(first), np.array(second)
    everything = list(range(len(first)))
    ours, theirs = (
        np.array([100 * x[s, 0].sum() / x[s, 1].sum() for s in [*some, everything]])
        for x, some in ((a, samples), (b, list(reversed(samples))))
    )
    *values, observed = theirs - ours
    return (np.sum(np.abs(values - np.mean(values)) >= abs(observed)) + 1) / (len(samples) + 1)


def p_of_means(first, second, samples):
    single = [100 * (mb / tb) - 100 * (ma / ta) for (ma, ta), (mb, tb) in zip(first, second, strict=True)]
    values = np.array([np.mean([single[q] for q in sample]) for sample in samples])
    return (np.sum(np.abs(values - values.mean()) >= abs(np.mean(single))) + 1) / (len(samples) + 1)


WRONG = {
    "05.stop": [
        (stop_kept, "stop token is kept"),
        (one_stop, "Only the first of the stop tokens"),
        (no_limit, "limit is ignored"),
        (always_stopped, "did not stop by itself"),
        (below_the_limit, "ids ran out without a stop token"),
        (to_the_last, "ends at the last stop token"),
        (lambda emitted, stop_ids, limit: emitted.index(stop_ids[0]), "raised ValueError"),
    ],
    "05.clipped_precision": [
        (lambda o, r, n: (sum(g in grams(r, n) for g in grams(o, n)), len(grams(o, n))), "not clipped"),
        (clipped_once, "counted once"),
        (lambda o, r, n: (clipped_with_removal(o, r, n)[0], len(grams(r, n))), "That is recall"),
        (one_short, "last sequence is missing"),
        (lambda o, r, n: clipped_with_removal(" ".join(o), " ".join(r), n), "entry 0"),
        (lambda o, r, n: clipped_with_removal(o, r, n)[0] / len(grams(o, n)), "ZeroDivisionError"),
    ],
    "05.bleu": [
        (lambda answers: bleu(answers, combine=np.mean), "arithmetic mean"),
        (lambda answers: bleu(answers, penalty=lambda c, r: 1), "brevity penalty is missing"),
        (lambda answers: bleu(answers, penalty=lambda c, r: exp(1 - r / c)), "scores of long outputs"),
        (mean_of_scores, "mean of the answers' own scores"),
        (mean_of_precisions, "averaged over the answers"),
        (lambda answers: bleu(answers) / 100, "from 0 to 1"),
        (lambda answers: bleu(answers, penalty=lambda c, r: min(1, c / r)), "ratio of the lengths"),
    ],
    "05.paired_bootstrap": [
        (p_one_sided, "one direction only"),
        (p_not_centered, "mean is not subtracted"),
        (p_of_distinct, "Drawn with replacement"),
        (p_unpaired, "different samples"),
        (p_of_means, "Add up the counts first"),
        (lambda a, b, samples: p_with_arrays(a, b, samples) - 1 / (len(samples) + 1), "it is"),
    ],
}
RIGHT = {
    "05.stop": [stop_with_index, stop_with_arrays, stop_with_takewhile],
    "05.clipped_precision": [clipped_with_removal, clipped_with_count, clipped_by_sacrebleu],
    "05.bleu": [bleu, bleu_with_logs, bleu_by_sacrebleu],
    "05.paired_bootstrap": [p_with_arrays, p_with_tensors, p_with_loops],
}
