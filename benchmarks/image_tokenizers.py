"""Every image tokenizer with every generator, at equal bits and equal training: `python benchmarks/image_tokenizers.py --out benchmarks/comparisons/image-tokenizers.json`.

One job is (tokenizer, seed): train the tokenizer, evaluate it, then train each generator on its codes and evaluate what it draws. Jobs that the
output file already holds are not run again, so that a run can be continued. All pictures are drawn scenes (tokbook.data.scenes), all
tokenizers spend 128 bits on one, and the Fréchet distances are on one small classifier's features: they compare with each other and with nothing else."""
import argparse, json, time
from functools import lru_cache
from pathlib import Path
import torch
from tokbook.codec import ImageTokenizer, TokenizerLoss, evaluate_tokenizer, fit_tokenizer, keep_mask, uniform_length
from tokbook.core import provenance, seed_all
from tokbook.data import SCENE_COLORS, scenes
from tokbook.generator import ARGenerator, MaskedGenerator, fit_generator
from tokbook.measure import feature_stats, fit_features, frechet
from tokbook.image import BinaryQuantizer, FlexTok, PatchPCA
from tokbook.quantize import BSQ, FSQ, VectorQuantize
from tokbook.train import Batches, fit

SIZES = dict(book=dict(images=4000, steps=1000, generator_steps=800, test=800), smoke=dict(images=300, steps=4, generator_steps=4, test=64))
BITS, LR = 128, 4e-3
LOSS = TokenizerLoss(pixel_weight=300.) # loud enough that every gradient is clipped to the same length: registers learn much faster so, and no quantizer's own loss drowns the pixels

def tokenizer(quantizer, **kw): return ImageTokenizer(16, 3, 4, dim=8, width=48, quantizer=quantizer, **kw)
def vq(): return VectorQuantize(8, 256, cosine=True, kmeans_init=True)
def fsq(): return FSQ([8, 8, 4], 8)
def flextok(x, decoder='flow'): return FlexTok(16, 3, 2, registers=16, levels=(8, 8, 4), width=48, decoder_depth=2, decoder=decoder, vae=PatchPCA(x, 4, 12)) # a frozen autoencoder underneath, as in the paper
TOKENIZERS = { # name -> (pictures -> tokenizer, rule for the length in training)
    'grid, VQ': (lambda x: tokenizer(vq()), None),
    'grid, FSQ': (lambda x: tokenizer(fsq()), None),
    'grid, BSQ': (lambda x: tokenizer(BSQ(8, 8)), None),
    'registers, FSQ': (lambda x: tokenizer(fsq(), latents=16), None),
    'registers, bits (Instella)': (lambda x: tokenizer(BinaryQuantizer(8, 8, tau=.3), latents=16), None),
    'registers, VQ, any prefix (One-D-Piece)': (lambda x: tokenizer(vq(), latents=16), uniform_length),
    'registers, FSQ, any prefix, flow (FlexTok)': (flextok, uniform_length),
}
GENERATORS = {'one after another': ARGenerator, 'masked': MaskedGenerator}


def data(n, split, seed=0): # -> pictures, class: the color of the object
    s = scenes(n, 16, objects=(1, 1), seed=seed, split=split)
    return s.image, s.colors[:, 0]


def train(make, length, x, steps, seed): # -> a trained tokenizer
    how = dict(seed=seed, progress=False); seed_all(seed); tok = make(x)
    if not tok.generative: fit_tokenizer(tok, x, steps=steps, objective=LOSS, length=length, lr=LR, **how); return tok
    first = make(x, 'direct')                                    # half of the steps for a direct decoder, whose weights start the flow, as in the chapter on FlexTok
    fit_tokenizer(first, x, steps=steps//2, objective=LOSS, length=length, lr=LR, **how)
    tok.load_state_dict(first.state_dict()); z, codes = tok.code(x), first.encode(x).values
    with torch.no_grad(): tok.decoder.out.weight.neg_(); tok.decoder.out.bias.neg_()
    n = tok.num_tokens; step = lambda d, b: d.loss(b[0], tok.quantizer.decode(b[1]), keep_mask(length(len(b[0]), n), n))
    fit(tok.decoder, step, Batches((z, codes), 64, seed=seed), steps=steps - steps//2, lr=LR, wd=.01, clip=1., schedule='onecycle', **how)
    return tok.eval()


@lru_cache
def common(images, steps, test): # -> training data, test data, the judge, its statistics of test pictures, and the distance between two sets of them
    judge = fit_features(*data(images, 'train', seed=1), steps=steps, seed=0)
    pictures = data(test, 'test')
    return data(images, 'train'), pictures, judge, feature_stats(pictures[0], judge.features), frechet(pictures[0], data(test, 'test', seed=1)[0], judge.features)


def run(name, seed, sizes): # -> list of rows
    (x, y), (test, ty), judge, real, floor = common(sizes['images'], max(10, sizes['steps']), sizes['test'])
    classes = len(SCENE_COLORS)
    make, length = TOKENIZERS[name]
    t0 = time.process_time(); tok = train(make, length, x, sizes['steps'], seed); seconds = time.process_time() - t0
    assert abs(tok.num_tokens*tok.bits_per_token - BITS) < 1e-6, f'{name} spends {tok.num_tokens*tok.bits_per_token} bits'
    draw = lambda v: tok.decode(v, **(dict(generator=torch.Generator().manual_seed(0)) if tok.generative else {}))
    row = dict(tokenizer=name, seed=seed, seconds=seconds, parameters=sum(p.numel() for p in tok.parameters()), floor=floor,
               **evaluate_tokenizer(tok, test, judge.features, **(dict(generator=torch.Generator().manual_seed(0)) if tok.generative else {})))
    with torch.no_grad(): row['real_accuracy'] = (judge(test).argmax(1) == ty).float().mean().item(); row['rec_accuracy'] = (judge(draw(tok.encode(test))).argmax(1) == ty).float().mean().item()
    codes, rows = torch.cat([tok.encode(b).values for b in x.split(500)]), []
    for g, make in GENERATORS.items():
        seed_all(seed); model = make(tok.vocab_size, tok.num_tokens, classes, q=codes.shape[2] if codes.ndim == 3 else 1)
        t0 = time.process_time(); fit_generator(model, codes, y, steps=sizes['generator_steps'], seed=seed, progress=False); seconds = time.process_time() - t0
        gen = torch.Generator().manual_seed(seed)
        ids = torch.cat([model.sample(b, generator=gen) for b in ty.split(250)])
        out = torch.cat([draw(b) for b in ids.split(250)])
        with torch.no_grad(): hit = (judge(out).argmax(1) == ty).float().mean().item()
        nats = model.loss(tok.encode(test).values, ty).item() if g == 'one after another' else None
        rows.append(row | dict(generator=g, generator_seconds=seconds, gen_fd=frechet(out, real, judge.features), gen_accuracy=hit, nats=nats))
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', default='benchmarks/comparisons/image-tokenizers.json'); p.add_argument('--size', choices=SIZES, default='book')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2]); p.add_argument('--only', nargs='*', choices=list(TOKENIZERS), metavar='TOKENIZER')
    a = p.parse_args(argv); out = Path(a.out); torch.set_num_threads(1)
    have = json.loads(out.read_text()) if out.exists() else dict(size=a.size, bits=BITS, sizes=SIZES[a.size], rows=[])
    if have['size'] != a.size: raise SystemExit(f'{out} holds size {have["size"]}: choose another --out')
    done = {(r['tokenizer'], r['seed']) for r in have['rows']}
    for seed in a.seeds:
        for name in a.only or TOKENIZERS:
            if (name, seed) in done: continue
            have['rows'] += run(name, seed, SIZES[a.size]); have['provenance'] = provenance()
            out.write_text(json.dumps(have, indent=1) + '\n')
            r = have['rows'][-2:]; print(f'{name}, seed {seed}: PSNR {r[0]["psnr"]:.2f}, FD {r[0]["fd"]:.3f}; ' + ', '.join(f'{o["generator"]} FD {o["gen_fd"]:.3f}, class {o["gen_accuracy"]:.2f}' for o in r), flush=True)
    return have

if __name__ == '__main__': main()
