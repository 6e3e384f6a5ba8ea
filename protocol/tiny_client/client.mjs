#!/usr/bin/env node
// A whole client of the sparseloco-peer protocol in one file: Node.js >= 20, no packages. Written from SPEC.md alone,
// whose sections it follows in their order; read the two side by side.
//
//   node client.mjs conform                                      the line protocol of protocol/README.md on stdin/stdout
//   node client.mjs join INVITE --home DIR --text FILE           take part in a run (Ctrl+C leaves)
//
// What it trains: every parameter, with exact gradients of its own backward pass and AdamW, on one processor core and in
// plain loops. That is slow, so it does the inner steps, and as many sequences in each, as fit into the round, and its
// packet says so.

import { createHash, createPrivateKey, createPublicKey, randomBytes, sign, verify } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import http2 from 'node:http2'
import { join as joinPath } from 'node:path'
import net from 'node:net'
import { createInterface } from 'node:readline'
import { setImmediate as breathe, setTimeout as sleep } from 'node:timers/promises'
import tls from 'node:tls'
import { fileURLToPath } from 'node:url'

// A refusal names its rule; the numbers are what records and gRPC trailers carry.
const CODES = {
  BAD_KEY: 101, BAD_SIGNATURE: 102, BAD_RUN: 201, OTHER_RUN: 202, BAD_INVITE: 203, VERSION: 204, BAD_AMENDMENT: 205,
  BAD_MAGIC: 301, TRUNCATED: 302, TRAILING: 303, RESERVED: 304, WRONG_ROUND: 305, WRONG_BASE: 306, TOO_LARGE: 307, BAD_FRAME: 308,
  BAD_ZSTD: 309, BAD_RATIO: 311, BAD_BLOCKS: 312, BAD_INDEX: 313, BAD_CODE: 314, BAD_PADDING: 315, BAD_MERKLE: 316,
  BAD_TOKENS: 317, DUPLICATE: 318, LATE: 319, NOT_A_MEMBER: 320, NO_QUORUM: 321, BANNED: 322, BAD_COUNT: 401, BAD_EXPONENT: 402,
  BAD_VALUE: 403, BAD_RECORD: 501, BROKEN_CHAIN: 502, NOT_AN_AGGREGATOR: 503, BAD_STATE: 504, BAD_DHT_KEY: 601,
  BAD_DHT_RECORD: 602, BAD_EXPIRY: 603, BAD_MESSAGE: 701, BAD_SESSION: 702, NOT_FOUND: 703, BUSY: 704, WRONG_DIGEST: 705,
}

/** Foreign bytes break a rule of the SPEC. */
class Refused extends Error {
  constructor(code, detail = '') {
    super(`SL${CODES[code] ?? '?'} ${code}${detail && ': ' + detail}`)
    this.code = code
  }
}
const demand = (holds, code, detail) => { if (!holds) throw new Refused(code, detail) }

/** Reads little-endian fields in order; what is missing is refused with `code`. */
class Reader {
  constructor(bytes, at = 0, code = 'TRUNCATED') { Object.assign(this, { bytes, at, code }) }
  get left() { return this.bytes.length - this.at }
  take(size) {
    demand(size <= this.left, this.code, `${this.left} bytes are left where ${size} should be`)
    return this.bytes.subarray(this.at, (this.at += size))
  }
  u8() { return this.take(1)[0] }
  u16() { return this.take(2).readUInt16LE() }
  u32() { return this.take(4).readUInt32LE() }
  u64() { return this.take(8).readBigUInt64LE() }
  end(code = 'TRAILING') { demand(this.left === 0, code, `${this.left} bytes follow the end`) }
}

const u16 = value => { const bytes = Buffer.alloc(2); bytes.writeUInt16LE(value); return bytes }
const u32 = value => { const bytes = Buffer.alloc(4); bytes.writeUInt32LE(value); return bytes }
const u64 = value => { const bytes = Buffer.alloc(8); bytes.writeBigUInt64LE(BigInt(value)); return bytes }
const zeros = size => Buffer.alloc(size)
const join = parts => Buffer.concat(parts)
const sum = numbers => numbers.reduce((total, number) => total + number, 0)
const hex = bytes => Buffer.from(bytes).toString('hex')
const unhex = text => Buffer.from(text, 'hex')
const same = (a, b) => Buffer.compare(a, b) === 0

// ------------------------------------------------------------------------------- 1. Hashes, keys, signatures

const tag = domain => Buffer.from(`sparseloco-peer/1\0${domain}\0`, 'ascii')

function sha256(...parts) {
  const hash = createHash('sha256')
  for (const part of parts) hash.update(part)
  return hash.digest()
}
const digest = (domain, ...parts) => sha256(tag(domain), ...parts)

const P = 2n ** 255n - 19n // the field of the curve
const ORDER = 2n ** 252n + 27742317777372353535851937790883648493n // L
const D = 37095705934669439343138083508754565189542113879843219016388785533085940283555n
const fromLittleEndian = bytes => BigInt('0x0' + hex(Buffer.from(bytes).reverse()))
const modulo = (value, by) => ((value % by) + by) % by

function power(base, exponent) {
  let result = 1n
  for (base = modulo(base, P); exponent; exponent >>= 1n, base = base * base % P) if (exponent & 1n) result = result * base % P
  return result
}

/** The strict rules for keys: canonical, on the curve, not of small order. */
function isKey(key) {
  const y = fromLittleEndian(key) & (2n ** 255n - 1n), y2 = y * y % P
  if (key.length !== 32 || y >= P) return false
  if (y === 0n || y === 1n || y === P - 1n || modulo(D * y2 * y2 + 2n * y2 - 1n, P) === 0n) return false
  // x^2 = u / v has a root exactly when u * v is a square, and neither is 0 here: Euler's criterion.
  return power((y2 - 1n) * (D * y2 + 1n), (P - 1n) / 2n) === 1n
}
const checkKey = key => demand(isKey(key), 'BAD_KEY', hex(key))

const SPKI = unhex('302a300506032b6570032100') // what DER puts before an Ed25519 public key
const PKCS8 = unhex('302e020100300506032b657004220420') // and before a private one

/** Strict Ed25519. The library compares encode(S B - H A) with R; S < L is looked at here as well. */
function checkSignature(key, domain, data, signature) {
  checkKey(key)
  const fits = signature.length === 64 && fromLittleEndian(signature.subarray(32)) < ORDER
  const publicKey = createPublicKey({ key: join([SPKI, key]), format: 'der', type: 'spki' })
  demand(fits && verify(null, join([tag(domain), data]), publicKey, signature), 'BAD_SIGNATURE', `domain ${domain}`)
}

function privateKey(seed) {
  const key = createPrivateKey({ key: join([PKCS8, seed]), format: 'der', type: 'pkcs8' })
  const publicKey = createPublicKey(key).export({ format: 'der', type: 'spki' }).subarray(-32)
  return { public: publicKey, sign: (domain, data) => sign(null, join([tag(domain), data]), key) }
}

const leafHash = data => sha256(Buffer.of(0), data)

function rootOfHashes(hashes) {
  if (hashes.length === 1) return hashes[0]
  let half = 1
  while (half * 2 < hashes.length) half *= 2
  return sha256(Buffer.of(1), rootOfHashes(hashes.slice(0, half)), rootOfHashes(hashes.slice(half)))
}
const merkleRoot = leaves => rootOfHashes(leaves.map(leafHash))

// ------------------------------------------------------------------------------- 2. The run

const whole = (least, most) => ({ kind: 'whole', least: BigInt(least), most: BigInt(most) })
const real = (least, most) => ({ kind: 'real', least, most })
const text = form => ({ kind: 'text', form })
const oneOf = (...values) => ({ kind: 'one', values })
const LABEL = text(/^[a-z0-9][a-z0-9._-]{0,63}$/)
const HASH = text(/^[0-9a-f]{64}$/)
const I64 = 2n ** 63n - 1n

const TABLES = {
  model: {
    architecture: oneOf('llama'), vocab_size: whole(2, 16777216), hidden_size: whole(1, 1048576),
    intermediate_size: whole(1, 4194304), num_hidden_layers: whole(1, 1024), num_attention_heads: whole(1, 1024),
    num_key_value_heads: whole(1, 1024), max_position_embeddings: whole(1, 16777216), rope_theta: real(1, 1e9),
    rms_norm_eps: real(1e-12, 0.01), tie_word_embeddings: oneOf(false, true), initializer_range: real(1e-6, 1),
    init_seed: whole(0, I64),
  },
  data: {
    corpus: LABEL, corpus_sha256: text(/^([0-9a-f]{64})?$/), tokenizer: text(/^(bytes|sha256:[0-9a-f]{64})$/),
    sequence_length: whole(1, 1048576), validation_fraction: real(0.0001, 0.5), seed: whole(0, I64),
  },
  inner: {
    steps: whole(1, 100000), batch_size: whole(1, 65536), learning_rate: real(1e-8, 1), adam_beta1: real(0, 0.9999),
    adam_beta2: real(0, 0.99999), adam_eps: real(1e-12, 0.1), weight_decay: real(0, 1), grad_clip_norm: real(1e-6, 1e6),
    warmup_steps: whole(0, 1000000), schedule: oneOf('cosine', 'constant'), min_lr_ratio: real(0, 1),
    overlap: oneOf(false, true),
  },
  compression: { k: whole(1, 4096), code_bits: whole(1, 2), beta: real(0, 1) },
  outer: { rule: oneOf('mean', 'mean_of_senders'), alpha: real(1 / 65536, 4), rounds: whole(1, 100000000) },
  rounds: {
    quorum: whole(1, 1024), grace_s_min: real(0, 86400), grace_s_max: real(0, 86400), deadline_s: real(0.1, 604800),
    start_peers: whole(1, 1024),
  },
}

/** A number's source text, kept because JSON.parse would lose both its form and the low digits of large ones. */
class Digits { constructor(source) { this.source = source } }

function parseJson(source) {
  // A text that does not end is matched too, so that the search never turns back and hostile input costs linear time.
  const tokens = /"(?:[^"\\]+|\\[^])*\\?(?:"|$)|-?[0-9][0-9.eE+-]*/g
  const marked = source.replace(tokens, part => part[0] === '"' ? part : `{"#":"${part}"}`)
  return JSON.parse(marked, (_, value) => value && typeof value['#'] === 'string' ? new Digits(value['#']) : value)
}

/** A float64 as Python's repr writes it. */
function realText(value) {
  const [, minus, first, rest = '', exponentText] = /^(-?)(\d)(?:\.(\d+))?e([+-]\d+)$/.exec(value.toExponential())
  const digits = first + rest
  const exponent = Number(exponentText)
  const signText = minus || (Object.is(value, -0) ? '-' : '')
  if (exponent < -4 || exponent >= 16) {
    const size = String(Math.abs(exponent)).padStart(2, '0')
    return `${signText}${first}${rest && '.' + rest}e${exponent < 0 ? '-' : '+'}${size}`
  }
  if (exponent < 0) return `${signText}0.${'0'.repeat(-exponent - 1)}${digits}`
  return `${signText}${digits.slice(0, exponent + 1).padEnd(exponent + 1, '0')}.${digits.slice(exponent + 1) || '0'}`
}

/** Read one value by its rule: [value, canonical text]. */
function readValue(name, value, rule, code = 'BAD_RUN') {
  const must = holds => demand(holds, code, `${name} is outside what the table allows`)
  if (rule.kind === 'one') {
    must(rule.values.includes(value))
    return [value, JSON.stringify(value)]
  }
  if (rule.kind === 'text') {
    must(typeof value === 'string' && rule.form.test(value))
    return [value, JSON.stringify(value)]
  }
  must(value instanceof Digits)
  if (rule.kind === 'whole') {
    must(/^\d+$/.test(value.source))
    const number = BigInt(value.source)
    must(number >= rule.least && number <= rule.most)
    return [Number(number), String(number)]
  }
  const number = Number(value.source)
  must(number >= rule.least && number <= rule.most)
  return [number, realText(number)]
}

function readTable(table, rules, name) {
  demand(typeof table === 'object' && table !== null, 'BAD_RUN', `${name} is no table`)
  demand(Object.keys(table).sort().join() === Object.keys(rules).sort().join(), 'BAD_RUN', `the keys of ${name}`)
  const values = {}, texts = []
  for (const key of Object.keys(rules).sort()) {
    const [value, valueText] = readValue(`${name}.${key}`, table[key], rules[key])
    values[key] = value
    texts.push(`"${key}":${valueText}`)
  }
  return [values, `{${texts.join()}}`]
}

/** A half goes to the even neighbour. */
function roundHalfEven(value) {
  const below = Math.floor(value)
  const up = value - below > 0.5 || (value - below === 0.5 && below % 2 === 1)
  return up ? below + 1 : below
}

/** The run of a canonical JSON text (bytes), with what follows from it. */
function readRun(json) {
  const source = json.toString('latin1')
  let value
  try { value = parseJson(source) } catch (error) { throw new Refused('BAD_RUN', error.message) }
  const keys = ['aggregators', 'genesis_root', 'layout', 'name', 'operator', ...Object.keys(TABLES)].sort()
  const isTable = value !== null && typeof value === 'object'
  demand(isTable && Object.keys(value).sort().join() === keys.join(), 'BAD_RUN', 'the keys of the run')
  const run = {}, texts = {}
  for (const [name, rules] of Object.entries(TABLES)) [run[name], texts[name]] = readTable(value[name], rules, name)
  for (const [name, rule] of [['name', LABEL], ['operator', HASH], ['genesis_root', HASH]]) {
    [run[name], texts[name]] = readValue(name, value[name], rule)
  }
  const keysFit = Array.isArray(value.aggregators) && value.aggregators.length >= 1 && value.aggregators.length <= 64 &&
    value.aggregators.every((key, i, all) => typeof key === 'string' && HASH.form.test(key) && (i === 0 || all[i - 1] < key))
  demand(keysFit, 'BAD_RUN', 'aggregators')
  demand([run.operator, ...value.aggregators].every(key => isKey(unhex(key))), 'BAD_RUN', 'a key')
  texts.aggregators = JSON.stringify(run.aggregators = value.aggregators)
  ;[run.layout, texts.layout] = readLayout(value.layout)
  checkRelations(run)
  demand(`{${keys.map(key => `"${key}":${texts[key]}`).join()}}` === source, 'BAD_RUN', 'the json is not canonical')
  run.id = digest('run', json)
  return derive(run)
}

/** What follows from the settings. */
function derive(run) {
  run.alphaQ16 = roundHalfEven(run.outer.alpha * 65536)
  run.nominal = run.inner.steps * run.inner.batch_size * run.data.sequence_length
  return run
}

function checkRelations({ model, data, rounds }) {
  const must = (holds, why) => demand(holds, 'BAD_RUN', why)
  must(model.hidden_size % (2 * model.num_attention_heads) === 0, 'hidden_size')
  must(model.num_attention_heads % model.num_key_value_heads === 0, 'num_key_value_heads')
  must(data.sequence_length <= model.max_position_embeddings, 'sequence_length')
  must(rounds.grace_s_min <= rounds.grace_s_max && rounds.grace_s_max <= rounds.deadline_s, 'grace')
}

/** The signed run: checked against `id` before anything is parsed, and against the operator's signature. */
function readSignedRun(bytes, id) {
  const reader = startOf(bytes, 'SLRN', 10)
  const size = reader.u32()
  demand(size <= 4 << 20, 'TOO_LARGE', 'the run')
  const json = reader.take(size)
  const signature = reader.take(64)
  reader.end()
  demand(!id || same(digest('run', json), id), 'OTHER_RUN')
  const run = readRun(json)
  checkSignature(unhex(run.operator), 'run', json, signature)
  return run
}

/** Magic and version, which nearly everything begins with; `size` bytes must be there to tell. */
function startOf(bytes, magic, size) {
  demand(bytes.subarray(0, 4).toString('latin1') === magic, 'BAD_MAGIC', `not ${magic}`)
  demand(bytes.length >= size, 'TRUNCATED')
  demand(bytes.readUInt16LE(4) === 1, 'VERSION')
  return new Reader(bytes, 6)
}

// ------------------------------------------------------------------------------- 3. Layout and state

const CHUNK = 4096
const BLOCK = 1024 // chunks
const PIECE = 4 << 20 // bytes

/** The tensors of a layout, checked: [{ tensors: [{ name, shape, size, offset }], size }, canonical text]. */
function readLayout(list) {
  const must = (holds, why) => demand(holds, 'BAD_RUN', `layout: ${why}`)
  must(Array.isArray(list) && list.length >= 1 && list.length <= 16384, 'the number of tensors')
  const tensors = [], texts = []
  let offset = 0
  for (const entry of list) {
    must(Array.isArray(entry) && entry.length === 2 && typeof entry[0] === 'string' && Array.isArray(entry[1]), 'an entry')
    const [name, dimensions] = entry
    must(/^[!-~]{1,200}$/.test(name), 'a name')
    must(tensors.length === 0 || tensors.at(-1).name < name, 'the order of the names')
    must(dimensions.length <= 8, 'more than eight dimensions')
    let size = 1
    for (const dimension of dimensions) {
      must(dimension instanceof Digits && /^\d{1,10}$/.test(dimension.source) && Number(dimension.source) >= 1, 'a dimension')
      size *= Number(dimension.source)
      must(size <= 2 ** 31, 'the size of a tensor')
    }
    const shape = dimensions.map(dimension => Number(dimension.source))
    tensors.push({ name, shape, size, offset })
    texts.push(`[${JSON.stringify(name)},[${shape.join()}]]`)
    offset += size
    must(offset <= 2 ** 40, 'the size of the model')
  }
  return [{ tensors, size: offset }, `[${texts.join()}]`]
}

const chunksOf = size => Math.ceil(size / CHUNK)
const lengthOf = (size, chunk) => Math.min(CHUNK, size - chunk * CHUNK)
const kept = (length, k) => Math.min(length, Math.ceil(k * length / CHUNK))
const blockWords = size => Math.ceil(chunksOf(size) / BLOCK) - 1

/** Sum of f(length of the chunk) over the chunks of a tensor; all but the last have the same length. */
function sumOfChunks(size, f) {
  const full = Math.floor(size / CHUNK)
  return full * f(CHUNK) + (size % CHUNK ? f(size % CHUNK) : 0)
}

const asBytes = floats => Buffer.from(floats.buffer, floats.byteOffset, floats.byteLength) // little-endian machines only

function pieceHashes(bytes) {
  const hashes = []
  for (let at = 0; at < bytes.length; at += PIECE) hashes.push(leafHash(bytes.subarray(at, at + PIECE)))
  return hashes
}
const stateRoot = floats => rootOfHashes(pieceHashes(asBytes(floats)))

// ------------------------------------------------------------------------------- 4. Compression

const f32 = Math.fround
const UNIT = 2 ** -38
const halve = (value, bits) => Math.floor(value / 2 ** bits) // a right shift for integers above 2^31

/** beta * residual + (outer - local). Doubles have more than twice the digits of floats, so rounding twice is rounding once. */
function accumulate(beta, residual, outer, local) {
  const factor = f32(beta)
  return Float32Array.from(residual, (value, i) => f32(f32(factor * value) + f32(outer[i] - local[i])))
}

/** The positions of the largest magnitudes of a chunk, ascending; of equal ones the lowest index is kept. */
function largest(magnitudes, count) {
  const keys = Float64Array.from(magnitudes, (bits, i) => bits * CHUNK + (CHUNK - 1 - i)).sort()
  return keys.subarray(keys.length - count).map(key => CHUNK - 1 - key % CHUNK).sort()
}

/** Means of the high and the low of f; all are high when none would be. */
function groups(f, isHigh) {
  const chosen = f.map(isHigh)
  const high = chosen.includes(true) ? chosen : chosen.fill(true)
  const mean = list => Math.floor(sum(list) / list.length)
  const lows = f.filter((_, i) => !high[i])
  const hi = mean(f.filter((_, i) => high[i]))
  return { high, hi, lo: lows.length ? mean(lows) : hi }
}

/** Scale, ratio and the high ones of a chunk's kept magnitudes (as bits), or null where the chunk is absent. */
function quantize(magnitudes, codeBits) {
  const field = bits => Math.max(1, bits >>> 23)
  const E = Math.max(...magnitudes.map(field))
  const f = magnitudes.map(bits => {
    const mantissa = (bits & 0x7fffff) | (bits >>> 23 ? 0x800000 : 0)
    const shift = E - field(bits)
    return shift >= 30 ? 0 : (mantissa << 6) >> shift
  })
  const total = sum(f)
  let split = groups(f, value => codeBits === 1 || value * f.length > total)
  if (codeBits === 2) {
    const middle = split.hi + split.lo
    split = groups(f, value => 2 * value > middle)
  }
  let { high, hi, lo } = split
  let shift = Math.max(0, 32 - Math.clz32(hi) - 4)
  let r = (hi + ((1 << shift) >> 1)) >> shift
  if (r === 16) { r = 8; shift += 1 }
  const e = E + shift - 123
  if (e < 0 || e * 8 + r - 8 === 0) return null
  const h = r * 2 ** shift
  let ratio = 0
  if (high.includes(false)) ratio = Math.min(63, Math.max(0, 64 - Math.floor((128 * lo + h) / (2 * h))))
  if (ratio === 0) high = high.fill(true)
  else {
    const l = halve(h * (64 - ratio), 6)
    const again = f.map(value => 2 * value > h + l)
    if (again.includes(true) && again.includes(false)) high = again
  }
  return { scale: e > 31 ? 255 : e * 8 + r - 8, ratio, high }
}

/** The dequantized grid integer of a code (bit 0: negative, bit 1: low); a double holds it exactly. */
function gridValue(scale, ratio, code) {
  const high = (8 + (scale & 7)) * 2 ** ((scale >> 3) + 5)
  const magnitude = code & 2 ? halve(high * (64 - ratio), 6) : high
  return code & 1 ? -magnitude : magnitude
}

/** One tensor's values to its sparse form and what is left of them. */
function compress(acc, k, codeBits) {
  if (!acc.every(Number.isFinite)) throw new RangeError('the pseudo-gradient holds an infinity or NaN; nothing is sent')
  const bits = new Uint32Array(acc.buffer, acc.byteOffset, acc.length)
  const sparse = emptySparse(acc.length)
  const residual = acc.slice()
  for (let chunk = 0; chunk < sparse.scales.length; chunk++) {
    const start = chunk * CHUNK, length = lengthOf(acc.length, chunk)
    const magnitudes = bits.subarray(start, start + length).map(value => value & 0x7fffffff)
    const positions = [...largest(magnitudes, kept(length, k))]
    const quantized = quantize(positions.map(i => magnitudes[i]), codeBits)
    if (quantized === null) continue
    sparse.scales[chunk] = quantized.scale
    sparse.ratios[chunk] = quantized.ratio
    positions.forEach((position, i) => {
      const code = (bits[start + position] >>> 31) | (quantized.high[i] ? 0 : 2)
      sparse.indices.push(start + position)
      sparse.codes.push(code)
      residual[start + position] = f32(acc[start + position] - gridValue(quantized.scale, quantized.ratio, code) * UNIT)
    })
  }
  return { sparse, residual }
}

// ------------------------------------------------------------------------------- 5. Packet

const emptySparse = size =>
  ({ size, scales: Buffer.alloc(chunksOf(size)), ratios: Buffer.alloc(chunksOf(size)), indices: [], codes: [] })

const gapBytesMax = (size, k) => sumOfChunks(size, length => kept(length, k) + Math.floor((length - kept(length, k)) / 255))
const codeBytes = (values, codeBits) => Math.ceil(values * codeBits / 8)

function sectionBytesMax(size, k, codeBits) {
  const values = sumOfChunks(size, length => kept(length, k))
  return chunksOf(size) * codeBits + 4 * blockWords(size) + gapBytesMax(size, k) + codeBytes(values, codeBits)
}

/** Gap bytes of all blocks and the lengths of all but the last. `counts` has the values of each chunk. */
function encodeGaps(counts, indices) {
  const gaps = [], lengths = []
  let next = 0, blockStart = 0
  counts.forEach((count, chunk) => {
    if (chunk && chunk % BLOCK === 0) {
      lengths.push(u32(gaps.length - blockStart))
      blockStart = gaps.length
    }
    let free = chunk * CHUNK // the lowest index that may come next
    for (const end = next + count; next < end; next++) {
      let gap = indices[next] - free
      for (; gap >= 255; gap -= 255) gaps.push(255)
      gaps.push(gap)
      free = indices[next] + 1
    }
  })
  return { blocks: join(lengths), gaps: Buffer.from(gaps) }
}

/** Calls visit(index, chunk) for each value; the gaps must hold that many. */
function walkGaps(counts, gaps, visit) {
  let at = 0
  counts.forEach((count, chunk) => {
    for (let index = chunk * CHUNK - 1; count > 0; count--) {
      do index += gaps[at]; while (gaps[at++] === 255)
      visit(++index, chunk)
    }
  })
}

/** Whether blocks fit is settled before whether indices do, and nothing is allocated for bytes that may be refused. */
function checkGaps(size, counts, blocks, gaps) {
  let at = 0, end = 0
  counts.forEach((count, chunk) => {
    if (chunk % BLOCK === 0) {
      demand(at === end, 'BAD_BLOCKS', 'gap bytes are left over in a block')
      const word = chunk / BLOCK * 4
      end = word < blocks.length ? at + blocks.readUInt32LE(word) : gaps.length
      demand(end <= gaps.length, 'BAD_BLOCKS', 'a block ends beyond the gaps')
    }
    for (; count > 0; at++) {
      demand(at < end, 'BAD_BLOCKS', 'a block ends inside its gaps')
      if (gaps[at] !== 255) count--
    }
  })
  demand(at === end, 'BAD_BLOCKS', 'gap bytes are left over in a block')
  walkGaps(counts, gaps, (index, chunk) => demand(index < chunk * CHUNK + lengthOf(size, chunk), 'BAD_INDEX', `chunk ${chunk}`))
}

function readIndices({ counts, gaps }) {
  const indices = new Uint32Array(sum(counts))
  let next = 0
  walkGaps(counts, gaps, index => { indices[next++] = index })
  return indices
}

const packetCounts = (size, k, scales) => Uint16Array.from(scales, (scale, chunk) => scale ? kept(lengthOf(size, chunk), k) : 0)

function encodeSection(sparse, k, codeBits) {
  const { blocks, gaps } = encodeGaps(packetCounts(sparse.size, k, sparse.scales), sparse.indices)
  const codes = Buffer.alloc(codeBytes(sparse.codes.length, codeBits))
  sparse.codes.forEach((code, i) => { codes[i * codeBits >> 3] |= code << (i * codeBits & 7) })
  return join([sparse.scales, codeBits === 2 ? sparse.ratios : zeros(0), blocks, gaps, codes])
}

/** The parts of a section, all rules checked. */
function checkSection(bytes, size, k, codeBits) {
  const chunks = chunksOf(size), reader = new Reader(bytes)
  const scales = reader.take(chunks), ratios = codeBits === 2 ? reader.take(chunks) : zeros(chunks)
  const blocks = reader.take(4 * blockWords(size))
  const counts = packetCounts(size, k, scales), values = sum(counts)
  const gapsLength = reader.left - codeBytes(values, codeBits)
  demand(gapsLength >= 0, 'TRUNCATED', 'codes are missing')
  const gaps = reader.take(gapsLength), packed = reader.take(reader.left)
  const code = i => packed[i * codeBits >> 3] >> (i * codeBits & 7) & (2 ** codeBits - 1)
  demand(ratios.every((ratio, chunk) => ratio <= 63 && (ratio === 0 || scales[chunk] !== 0)), 'BAD_RATIO')
  checkGaps(size, counts, blocks, gaps)
  const spare = packed.length * 8 - values * codeBits
  demand(spare === 0 || packed.at(-1) >> (8 - spare) === 0, 'BAD_PADDING')
  const lows = new Uint16Array(chunks) // of each chunk
  for (let chunk = 0, next = 0; chunk < chunks; chunk++) {
    for (const end = next + counts[chunk]; next < end; next++) lows[chunk] += code(next) >> 1
  }
  demand(lows.every((low, chunk) => low === 0 || ratios[chunk] !== 0), 'BAD_CODE', 'low where the ratio is 0')
  const mixed = lows.every((low, chunk) => ratios[chunk] === 0 || (low > 0 && low < counts[chunk]))
  demand(mixed, 'BAD_RATIO', 'nothing low or nothing high')
  return { scales, ratios, counts, gaps, code }
}

/** Indices and grid integers of a section. */
function decodeSection(bytes, size, k, codeBits) {
  const section = checkSection(bytes, size, k, codeBits), { scales, ratios, code } = section
  const indices = readIndices(section)
  const values = Float64Array.from(indices, (index, i) => {
    const chunk = Math.floor(index / CHUNK)
    return gridValue(scales[chunk], ratios[chunk], code(i))
  })
  return { indices, values }
}

const PACKET_HEADER = 216

function readPacketHeader(bytes) {
  const reader = startOf(bytes, 'SLPK', 8)
  demand(bytes.length >= PACKET_HEADER, 'TRUNCATED')
  demand(bytes.length === PACKET_HEADER, 'TRAILING')
  demand(reader.u16() === 0, 'RESERVED')
  const runId = reader.take(32), round = reader.u32(), baseRoot = reader.take(32), peer = reader.take(32)
  const tokens = reader.u64(), innerSteps = reader.u32(), root = reader.take(32), signature = reader.take(64)
  demand(tokens >= 1n && tokens <= 2n ** 48n && innerSteps >= 1, 'BAD_TOKENS')
  return { runId, round, baseRoot, peer, tokens: Number(tokens), innerSteps, root, signature }
}

function makePacket(run, key, round, baseRoot, tokens, innerSteps, sections) {
  const open = join([
    Buffer.from('SLPK'), u16(1), u16(0), run.id, u32(round), baseRoot, key.public, u64(tokens), u32(innerSteps), merkleRoot(sections),
  ])
  return join([open, key.sign('packet', open)])
}

function checkSections(run, sections, root, bytesMax) {
  const { tensors } = run.layout
  demand(sections.length >= tensors.length, 'TRUNCATED', 'sections are missing')
  demand(sections.length === tensors.length, 'TRAILING', 'sections are left over')
  demand(sections.every((section, i) => section.length <= bytesMax(tensors[i].size)), 'TOO_LARGE', 'a section')
  demand(same(merkleRoot(sections), root), 'BAD_MERKLE')
}

/** All rules of a packet. */
function checkPacket(run, header, sections, round, baseRoot) {
  const { k, code_bits: codeBits } = run.compression
  const fields = readPacketHeader(header)
  demand(same(fields.runId, run.id), 'OTHER_RUN')
  demand(fields.round === round, 'WRONG_ROUND')
  demand(same(fields.baseRoot, baseRoot), 'WRONG_BASE')
  checkSignature(fields.peer, 'packet', header.subarray(0, 152), fields.signature)
  checkSections(run, sections, fields.root, size => sectionBytesMax(size, k, codeBits))
  run.layout.tensors.forEach(({ size }, i) => checkSection(sections[i], size, k, codeBits))
}

// ------------------------------------------------------------------------------- 6. Transport form

/** Planes, lengths and limits of a packet's frames. The first planes say how many values each chunk has. */
const packetForm = run => {
  const { k, code_bits: codeBits } = run.compression
  return {
    header: PACKET_HEADER,
    readHeader: readPacketHeader,
    countPlanes: 1,
    counts: (size, [scales]) => packetCounts(size, k, scales),
    markBytes: chunks => codeBits === 2 ? chunks : 0,
    gapsMax: size => gapBytesMax(size, k),
    valueBytes: values => codeBytes(values, codeBits),
    sectionMax: size => sectionBytesMax(size, k, codeBits),
    head: ([scales]) => scales,
  }
}

/** Likewise of an update. Its section's counts are u16, its frame has their low and high bytes in two planes. */
const updateForm = () => ({
  header: UPDATE_HEADER,
  readHeader: readUpdateHeader,
  countPlanes: 2,
  counts: (size, [low, high]) => {
    const counts = Uint16Array.from(low, (byte, chunk) => byte + 256 * high[chunk])
    demand(counts.every((count, chunk) => count <= lengthOf(size, chunk)), 'BAD_COUNT')
    return counts
  },
  markBytes: chunks => chunks,
  gapsMax: size => size,
  valueBytes: values => values,
  sectionMax: updateSectionBytesMax,
  head: ([low, high]) => Buffer.from({ length: 2 * low.length }).map((_, i) => (i % 2 ? high : low)[i >> 1]),
})

const wireBytesMax = (run, form) => form.header + sum(run.layout.tensors.map(({ size }) => form.sectionMax(size) + 32))

/** Packet or update in transport form -> its header and canonical sections. Nothing is expanded beyond a known length. */
function fromWire(run, bytes, form) {
  demand(bytes.length <= wireBytesMax(run, form), 'TOO_LARGE', 'beyond the bound of the run')
  const header = bytes.subarray(0, form.header)
  demand(same(form.readHeader(header).runId, run.id), 'OTHER_RUN')
  const reader = new Reader(bytes, form.header)
  const sections = []
  while (sections.length < run.layout.tensors.length) sections.push(...readFrame(run, reader, form, sections.length))
  reader.end()
  return { header, sections }
}

function readFrame(run, reader, form, first) {
  const count = reader.u32(), gapsLength = reader.u32()
  const stored = Array.from({ length: form.countPlanes + 4 }, () => reader.u32())
  demand(sum(stored) <= reader.left, 'TRUNCATED', 'a frame ends too early')
  demand(count >= 1 && count <= run.layout.tensors.length - first, 'BAD_FRAME', 'the number of sections')
  const sizes = run.layout.tensors.slice(first, first + count).map(({ size }) => size)
  demand(gapsLength <= sum(sizes.map(form.gapsMax)), 'TOO_LARGE', 'gaps')
  const plane = lengths => { // of each section, whose parts it returns
    const length = sum(lengths), size = stored.shift()
    demand(size <= length, 'BAD_FRAME', 'a plane is stored in more bytes than it has')
    const bytes = reader.take(size), parts = new Reader(size < length ? unzstd(bytes, length) : bytes)
    return lengths.map(part => parts.take(part))
  }
  const chunks = sizes.map(chunksOf)
  const countPlanes = Array.from({ length: form.countPlanes }, () => plane(chunks))
  const countBytes = sizes.map((_, i) => countPlanes.map(parts => parts[i]))
  const values = sizes.map((size, i) => sum(form.counts(size, countBytes[i])))
  const marks = plane(chunks.map(form.markBytes)), blocks = plane(sizes.map(size => 4 * blockWords(size)))
  const [gaps] = plane([gapsLength])
  const ends = endsOfGaps(gaps, values)
  const codes = plane(values.map(form.valueBytes))
  return sizes.map((_, i) => join([form.head(countBytes[i]), marks[i], blocks[i], gaps.subarray(ends[i - 1] ?? 0, ends[i]), codes[i]]))
}

/** Where each section's gaps end: with as many bytes other than 255 as it has values. */
function endsOfGaps(gaps, values) {
  let at = 0
  const ends = values.map(count => {
    for (; count > 0; at++) {
      demand(at < gaps.length, 'BAD_FRAME', 'gaps are missing')
      if (gaps[at] !== 255) count--
    }
    return at
  })
  demand(at === gaps.length, 'BAD_FRAME', 'gaps are left over')
  return ends
}

/** A packet in transport form, a frame for each section. Planes are stored as they are, for this file has no zstd encoder. */
function packetToWire(run, header, sections) {
  const form = packetForm(run)
  const frames = sections.map((section, i) => {
    const { size } = run.layout.tensors[i], chunks = chunksOf(size), reader = new Reader(section)
    const scales = reader.take(chunks), marks = reader.take(form.markBytes(chunks)), blocks = reader.take(4 * blockWords(size))
    const gaps = reader.take(reader.left - form.valueBytes(sum(form.counts(size, [scales]))))
    const planes = [scales, marks, blocks, gaps, reader.take(reader.left)]
    return join([u32(1), u32(gaps.length), ...planes.map(plane => u32(plane.length)), ...planes])
  })
  return join([header, ...frames])
}

// zstd (RFC 8878). Everything malformed is BAD_ZSTD; the output is allocated once, in the length that the frame must declare.

const sound = (holds, why) => demand(holds, 'BAD_ZSTD', why)
const topBit = value => 31 - Math.clz32(value)
const WINDOW_MAX = 8 << 20
const ZSTD_BLOCK = 128 << 10

/** Bits from the end of a byte string towards its start; before the start there are zeros, and `left` is negative. */
class BackwardBits {
  constructor(bytes) {
    sound(bytes.length && bytes.at(-1), 'a bit stream does not end with a 1')
    Object.assign(this, { bytes, left: (bytes.length - 1) * 8 + topBit(bytes.at(-1)) })
  }
  read(count) {
    if (count > 16) return this.read(count - 16) * 65536 + this.read(16)
    this.left -= count
    return this.peekAt(this.left, count)
  }
  peekAt(bit, count) { // at most 16
    const { bytes } = this, at = bit >> 3
    const three = (bytes[at] ?? 0) | (bytes[at + 1] ?? 0) << 8 | (bytes[at + 2] ?? 0) << 16
    return three >> (bit & 7) & (1 << count) - 1
  }
}

function unzstd(bytes, length) {
  const reader = new Reader(bytes, 0, 'BAD_ZSTD')
  sound(reader.u32() === 0xfd2fb528, 'no zstd frame')
  const descriptor = reader.u8()
  const [single, checksum, dictionary] = [descriptor & 32, descriptor & 4, [0, 1, 2, 4][descriptor & 3]]
  sound((descriptor & 8) === 0, 'a reserved bit')
  const windowByte = single ? 0 : reader.u8()
  sound(reader.take(dictionary).every(byte => byte === 0), 'a dictionary')
  const sizeBytes = descriptor >> 6 ? 1 << (descriptor >> 6) : single ? 1 : 0
  const declared = Number(fromLittleEndian(reader.take(sizeBytes))) + (sizeBytes === 2 ? 256 : 0)
  sound(sizeBytes > 0 && declared === length, 'the content size is not the length of the plane')
  const base = 2 ** (10 + (windowByte >> 3))
  const window = single ? declared : base + base / 8 * (windowByte & 7)
  sound(window <= WINDOW_MAX, 'the window is too large')
  const out = { bytes: Buffer.alloc(length), at: 0 }
  const tables = { offsets: [1, 4, 8] } // what later blocks of a frame may use again
  for (let last = 0; !last;) {
    const head = reader.take(3).readUIntLE(0, 3), size = head >> 3, type = head >> 1 & 3
    last = head & 1
    sound(type < 3 && size <= Math.min(window, ZSTD_BLOCK), 'a block')
    if (type === 0) emit(out, reader.take(size))
    else if (type === 1) emit(out, Buffer.alloc(Math.min(size, length - out.at + 1), reader.u8()))
    else expandBlock(new Reader(reader.take(size), 0, 'BAD_ZSTD'), out, tables, Math.min(window, ZSTD_BLOCK))
  }
  sound(out.at === length, 'less content than declared')
  if (checksum) sound(reader.u32() === Number(xxh64(out.bytes) & 0xffffffffn), 'the checksum')
  reader.end('BAD_ZSTD')
  return out.bytes
}

function emit(out, bytes) {
  sound(bytes.length <= out.bytes.length - out.at, 'more content than declared')
  out.bytes.set(bytes, out.at)
  out.at += bytes.length
}

function expandBlock(reader, out, tables, most) {
  const start = out.at
  const literals = readLiterals(reader, tables, most)
  let used = 0
  for (const [literalCount, match, offset] of readSequences(reader, tables)) {
    sound(literalCount <= literals.length - used, 'literals are missing')
    emit(out, literals.subarray(used, (used += literalCount)))
    sound(offset >= 1 && offset <= out.at && match <= out.bytes.length - out.at, 'a match reaches outside')
    for (const end = out.at + match; out.at < end; out.at++) out.bytes[out.at] = out.bytes[out.at - offset]
  }
  emit(out, literals.subarray(used))
  sound(out.at - start <= most, 'a block is too large')
}

function readLiterals(reader, tables, most) {
  const first = reader.bytes[reader.at] ?? 0, type = first & 3, format = first >> 2 & 3
  if (type < 2) { // raw or one byte repeated
    const size = format === 1 ? reader.u16() >> 4 : format === 3 ? reader.take(3).readUIntLE(0, 3) >> 4 : reader.u8() >> 3
    sound(size <= most, 'too many literals')
    return type === 0 ? reader.take(size) : Buffer.alloc(size, reader.u8())
  }
  const width = [10, 10, 14, 18][format]
  const head = reader.take([3, 3, 4, 5][format]).readUIntLE(0, [3, 3, 4, 5][format])
  const size = halve(head, 4) % 2 ** width, stored = halve(head, 4 + width)
  sound(size <= most, 'too many literals')
  const body = new Reader(reader.take(stored), 0, 'BAD_ZSTD')
  if (type === 2) tables.huffman = readHuffman(body)
  sound(tables.huffman, 'no Huffman table to use again')
  const literals = Buffer.alloc(size)
  if (format === 0) unHuffman(body.take(body.left), literals, tables.huffman)
  else {
    const sizes = [body.u16(), body.u16(), body.u16()], part = Math.ceil(size / 4)
    sound(part * 3 <= size, 'four streams of too few literals')
    for (let i = 0; i < 4; i++) {
      unHuffman(body.take(i < 3 ? sizes[i] : body.left), literals.subarray(i * part, i < 3 ? (i + 1) * part : size), tables.huffman)
    }
  }
  return literals
}

function unHuffman(bytes, literals, { width, symbols, lengths }) {
  const bits = new BackwardBits(bytes)
  for (let i = 0; i < literals.length; i++) {
    const entry = bits.peekAt(bits.left - width, width)
    literals[i] = symbols[entry]
    bits.left -= lengths[entry]
    sound(bits.left >= 0, 'a Huffman stream is too short')
  }
  sound(bits.left === 0, 'a Huffman stream is too long')
}

function readHuffman(reader) {
  const first = reader.u8()
  let weights = []
  if (first >= 128) {
    for (const byte of reader.take(Math.ceil((first - 127) / 2))) weights.push(byte >> 4, byte & 15)
    weights.length = first - 127
  } else weights = readWeights(new Reader(reader.take(first), 0, 'BAD_ZSTD'))
  const total = sum(weights.map(weight => weight && 2 ** (weight - 1)))
  sound(total > 0, 'no Huffman weights')
  const width = topBit(total) + 1, rest = 2 ** width - total
  sound(width <= 11 && Number.isInteger(Math.log2(rest)), 'Huffman weights')
  weights.push(Math.log2(rest) + 1)
  const symbols = Buffer.alloc(2 ** width), lengths = Buffer.alloc(2 ** width)
  let at = 0
  for (let weight = 1; weight <= width; weight++) { // the longest codes come first, symbols in order within a length
    weights.forEach((own, symbol) => {
      if (own !== weight) return
      symbols.fill(symbol, at, at + 2 ** (weight - 1))
      lengths.fill(width + 1 - weight, at, (at += 2 ** (weight - 1)))
    })
  }
  return { width, symbols, lengths }
}

/** Huffman weights, written by two FSE states in turn until the bits are used up. */
function readWeights(reader) {
  const table = readFse(reader, 6, 255)
  const bits = new BackwardBits(reader.take(reader.left))
  const states = [bits.read(table.log), bits.read(table.log)], weights = []
  for (let turn = 0; ; turn ^= 1) {
    weights.push(table.symbols[states[turn]])
    states[turn] = table.next[states[turn]] + bits.read(table.bits[states[turn]])
    sound(weights.length < 255, 'too many Huffman weights')
    if (bits.left < 0) return [...weights, table.symbols[states[turn ^ 1]]]
  }
}

/** An FSE table from its description. */
function readFse(reader, logMax, symbolMax) {
  let bit = reader.at * 8
  const read = count => {
    let value = 0
    for (let i = 0; i < count; i++, bit++) value |= ((reader.bytes[bit >> 3] ?? 0) >> (bit & 7) & 1) << i
    return value
  }
  const log = read(4) + 5, shares = []
  sound(log <= logMax, 'the accuracy of an FSE table')
  for (let rest = 1 << log; rest > 0;) {
    const count = topBit(rest + 1) + 1, low = (1 << (count - 1)) - 1, spare = (1 << count) - 2 - rest
    let value = read(count - 1) // one bit less is enough for the smallest
    if (value >= spare && read(1)) value += low + 1 - spare
    shares.push(value - 1)
    rest -= Math.abs(value - 1)
    if (value === 1) for (let more = 3; more === 3;) shares.push(...Array(more = read(2)).fill(0))
    sound(rest >= 0 && shares.length <= symbolMax + 1, 'the shares of an FSE table')
  }
  reader.take(Math.ceil(bit / 8) - reader.at)
  return fseTable(shares, log)
}

function fseTable(shares, log) {
  const size = 1 << log, step = (size >> 1) + (size >> 3) + 3
  const table = { log, symbols: Buffer.alloc(size), bits: Buffer.alloc(size), next: new Uint16Array(size) }
  let high = size, at = 0
  shares.forEach((share, symbol) => { if (share === -1) table.symbols[--high] = symbol })
  shares.forEach((share, symbol) => {
    for (let i = 0; i < share; i++) {
      table.symbols[at] = symbol
      do at = (at + step) & (size - 1); while (at >= high)
    }
  })
  const seen = shares.map(Math.abs)
  for (let state = 0; state < size; state++) {
    const number = seen[table.symbols[state]]++
    table.bits[state] = log - topBit(number)
    table.next[state] = (number << table.bits[state]) - size
  }
  return table
}

const runs = text => text.split(' ').flatMap(part => Array(Number(part.split('x')[1] ?? 1)).fill(Number(part.split('x')[0])))
const baseline = (first, bits) => bits.map((_, i) => first + sum(bits.slice(0, i).map(count => 2 ** count)))
const LITERAL_BITS = runs('0x16 1x4 2x2 3x2 4 6 7 8 9 10 11 12 13 14 15 16')
const MATCH_BITS = runs('0x32 1x4 2x2 3x2 4x2 5 7 8 9 10 11 12 13 14 15 16')
const LITERAL_BASE = baseline(0, LITERAL_BITS), MATCH_BASE = baseline(3, MATCH_BITS)
const SEQUENCE_CODES = [ // literal lengths, offsets, match lengths: most bits, largest code, default table
  { log: 9, most: 35, standard: fseTable(runs('4 3 2x11 1x3 2x9 3 2 1x5 -1x4'), 6) },
  { log: 8, most: 31, standard: fseTable(runs('1x6 2x3 1x15 -1x5'), 5) },
  { log: 9, most: 52, standard: fseTable(runs('1 4 3 2x6 1x37 -1x7'), 6) },
]

/** Yields [literals, match length, offset]. */
function* readSequences(reader, tables) {
  let count = reader.u8()
  if (count === 255) count = reader.u16() + 0x7f00
  else if (count >= 128) count = (count - 128) * 256 + reader.u8()
  if (count === 0) return reader.end('BAD_ZSTD')
  const modes = reader.u8()
  sound((modes & 3) === 0, 'a reserved bit')
  const codes = tables.codes = SEQUENCE_CODES.map(({ log, most, standard }, i) => {
    const mode = modes >> (6 - 2 * i) & 3
    if (mode === 0) return standard
    if (mode === 2) return readFse(reader, log, most)
    if (mode === 1) {
      const symbol = reader.u8()
      sound(symbol <= most, 'a sequence code')
      return { log: 0, symbols: [symbol], bits: [0], next: [0] }
    }
    sound(tables.codes, 'no table to use again')
    return tables.codes[i]
  })
  const bits = new BackwardBits(reader.take(reader.left))
  const states = codes.map(table => bits.read(table.log))
  for (let left = count; left > 0; left--) {
    const [literal, offsetCode, match] = codes.map((table, i) => table.symbols[states[i]])
    const value = 2 ** offsetCode + bits.read(offsetCode)
    const matchLength = MATCH_BASE[match] + bits.read(MATCH_BITS[match])
    const literals = LITERAL_BASE[literal] + bits.read(LITERAL_BITS[literal])
    if (left > 1) for (const i of [0, 2, 1]) states[i] = codes[i].next[states[i]] + bits.read(codes[i].bits[states[i]])
    sound(bits.left >= 0, 'sequences are missing')
    yield [literals, matchLength, takeOffset(tables.offsets, value, literals === 0)]
  }
  sound(bits.left === 0, 'sequences are left over')
}

/** Values 1 to 3 name recent offsets, one later when no literals come before; the list moves what is used to its front. */
function takeOffset(recent, value, shifted) {
  const which = value > 3 ? 3 : value - 1 + shifted
  const offset = value > 3 ? value - 3 : which === 3 ? recent[0] - 1 : recent[which]
  recent.splice(Math.min(which, 2), 1)
  recent.unshift(offset)
  return offset
}

/** The checksum of a frame: xxHash-64 with the seed 0. */
function xxh64(bytes) {
  const MASK = 2n ** 64n - 1n
  const [p1, p2, p3, p4, p5] = [
    0x9e3779b185ebca87n, 0xc2b2ae3d27d4eb4fn, 0x165667b19e3779f9n, 0x85ebca77c2b2ae63n, 0x27d4eb2f165667c5n,
  ]
  const turn = (value, by) => (value << by | value >> (64n - by)) & MASK
  const round = (state, word) => turn((state + word * p2) & MASK, 31n) * p1 & MASK
  let at = 0, hash = p5
  if (bytes.length >= 32) {
    const lanes = [p1 + p2 & MASK, p2, 0n, MASK + 1n - p1]
    for (; at + 32 <= bytes.length; at += 32) for (let i = 0; i < 4; i++) lanes[i] = round(lanes[i], bytes.readBigUInt64LE(at + 8 * i))
    hash = turn(lanes[0], 1n) + turn(lanes[1], 7n) + turn(lanes[2], 12n) + turn(lanes[3], 18n) & MASK
    for (const lane of lanes) hash = ((hash ^ round(0n, lane)) * p1 + p4) & MASK
  }
  hash = hash + BigInt(bytes.length) & MASK
  for (; at + 8 <= bytes.length; at += 8) hash = (turn(hash ^ round(0n, bytes.readBigUInt64LE(at)), 27n) * p1 + p4) & MASK
  if (at + 4 <= bytes.length) {
    hash = (turn(hash ^ BigInt(bytes.readUInt32LE(at)) * p1 & MASK, 23n) * p2 + p3) & MASK
    at += 4
  }
  for (; at < bytes.length; at++) hash = turn(hash ^ BigInt(bytes[at]) * p5 & MASK, 11n) * p1 & MASK
  hash = (hash ^ hash >> 33n) * p2 & MASK
  hash = (hash ^ hash >> 29n) * p3 & MASK
  return hash ^ hash >> 32n
}

// ------------------------------------------------------------------------------- 7. Merge and update

const UPDATE_HEADER = 140

const weightOf = (tokens, nominal) => Math.min(4096, Math.max(1, Number(BigInt(tokens) * 1024n / BigInt(nominal))))

/** Merge one tensor of all contributions [{ indices, values, weight, clip }] to an update tensor. */
function merge(contributions, size, rule, alphaQ16) {
  const sums = new BigInt64Array(size), weights = new Float64Array(size) // num and den
  let totalWeight = 0
  for (const { indices, values, weight, clip } of contributions) {
    totalWeight += weight
    indices.forEach((index, i) => {
      // A value has at most ten significant bits, so these products are exact in a double.
      sums[index] += BigInt(Math.sign(values[i]) * weight * Math.floor(Math.abs(values[i]) * clip / 65536))
      weights[index] += weight
    })
  }
  const steps = new Float64Array(size)
  weights.forEach((weight, index) => {
    if (weight === 0) return
    const magnitude = sums[index] < 0n ? -sums[index] : sums[index]
    const mean = magnitude / BigInt(rule === 'mean' ? totalWeight : weight)
    steps[index] = Number(mean * BigInt(alphaQ16) >> 16n) * (sums[index] < 0n ? -1 : 1)
  })
  return toUpdateTensor(steps)
}

/** Put the exact steps on a grid of signed bytes, chunk by chunk. */
function toUpdateTensor(steps) {
  const tensor = { size: steps.length, counts: [], exponents: [], indices: [], values: [] }
  for (let start = 0; start < steps.length; start += CHUNK) {
    const chunk = steps.subarray(start, start + CHUNK)
    const most = chunk.reduce((a, b) => Math.max(a, Math.abs(b)), 0)
    const rounded = (magnitude, e) => halve(magnitude + (e ? 2 ** (e - 1) : 0), e)
    let e = 0
    while (rounded(most, e) > 127) e++
    const before = tensor.values.length
    chunk.forEach((step, i) => {
      const m = rounded(Math.abs(step), e)
      if (m === 0) return
      tensor.indices.push(start + i)
      tensor.values.push(step < 0 ? -m : m)
    })
    tensor.counts.push(tensor.values.length - before)
    tensor.exponents.push(tensor.values.length > before ? e : 0)
  }
  return tensor
}

const updateSectionBytesMax = size => 3 * chunksOf(size) + 4 * blockWords(size) + 2 * size

function encodeUpdateSection({ counts, exponents, indices, values }) {
  const { blocks, gaps } = encodeGaps(counts, indices)
  return join([...counts.map(u16), Buffer.from(exponents), blocks, gaps, Buffer.from(values)])
}

/** The parts of an update's section, all rules checked. */
function checkUpdateSection(bytes, size) {
  const chunks = chunksOf(size), reader = new Reader(bytes)
  const head = reader.take(2 * chunks), exponents = reader.take(chunks), blocks = reader.take(4 * blockWords(size))
  const counts = Uint16Array.from({ length: chunks }, (_, chunk) => head.readUInt16LE(2 * chunk))
  demand(counts.every((count, chunk) => count <= lengthOf(size, chunk)), 'BAD_COUNT')
  const gapsLength = reader.left - sum(counts)
  demand(gapsLength >= 0, 'TRUNCATED', 'values are missing')
  const gaps = reader.take(gapsLength), rest = reader.take(reader.left)
  const values = new Int8Array(rest.buffer, rest.byteOffset, rest.length)
  demand(exponents.every((e, chunk) => e <= 35 && (e === 0 || counts[chunk] > 0)), 'BAD_EXPONENT')
  checkGaps(size, counts, blocks, gaps)
  demand(values.every(value => value !== 0 && value !== -128), 'BAD_VALUE')
  let next = 0
  counts.forEach((count, chunk) => {
    const coarse = exponents[chunk] !== 0 && values.subarray(next, next + count).every(value => Math.abs(value) <= 63)
    demand(!coarse, 'BAD_EXPONENT', 'a smaller exponent would do')
    next += count
  })
  return { exponents, counts, gaps, values }
}

/** Indices of an update's section and the float32 numbers to subtract there; a double holds each exactly. */
function decodeUpdateSection(bytes, size) {
  const section = checkUpdateSection(bytes, size), indices = readIndices(section)
  const steps = Float64Array.from(indices, (index, i) => section.values[i] * 2 ** section.exponents[Math.floor(index / CHUNK)] * UNIT)
  return { indices, values: steps }
}

/** outer = outer - value in place, one float32 subtraction each. */
function applyUpdate(outer, section) {
  const { indices, values } = decodeUpdateSection(section, outer.length)
  indices.forEach((index, i) => { outer[index] = f32(outer[index] - values[i]) })
}

function readUpdateHeader(bytes) {
  const reader = startOf(bytes, 'SLUP', 8)
  demand(bytes.length >= UPDATE_HEADER, 'TRUNCATED')
  demand(bytes.length === UPDATE_HEADER, 'TRAILING')
  demand(reader.u16() === 0, 'RESERVED')
  return { runId: reader.take(32), round: reader.u32(), baseRoot: reader.take(32), newRoot: reader.take(32), root: reader.take(32) }
}

const makeUpdate = (run, round, baseRoot, newRoot, sections) =>
  join([Buffer.from('SLUP'), u16(1), u16(0), run.id, u32(round), baseRoot, newRoot, merkleRoot(sections)])

/** All rules of an update. */
function checkUpdate(run, header, sections, updateDigest) {
  const fields = readUpdateHeader(header)
  demand(same(digest('update', header), updateDigest), 'WRONG_DIGEST')
  demand(same(fields.runId, run.id), 'OTHER_RUN')
  checkSections(run, sections, fields.root, updateSectionBytesMax)
  run.layout.tensors.forEach(({ size }, i) => checkUpdateSection(sections[i], size))
}

// ------------------------------------------------------------------------------- 8. Round record and ledger

const [GENESIS, APPLIED, NULL, ROLLBACK] = [0, 1, 2, 3]
const [COMPLETE, DEADLINE, OPERATOR] = [1, 3, 4]
const ENTRY = 85

function readEntry(reader) {
  return {
    peer: reader.take(32), packet: reader.take(32), verdict: reader.u8(), code: reader.u16(), tokens: reader.u64(),
    innerSteps: reader.u32(), weight: reader.u16(), clip: reader.u32(),
  }
}

/** The fields of a record's bytes, nothing checked but their size. */
function parseRecord(bytes) {
  const reader = startOf(bytes, 'SLRR', 204)
  const record = {
    kind: reader.u8(), reason: reader.u8(), runId: reader.take(32), round: reader.u32(), epoch: reader.u32(),
    previous: reader.take(32), stateRoot: reader.take(32), update: reader.take(32), amendment: reader.take(32), opened: reader.u64(),
    closed: reader.u64(), evaluated: reader.u32(), loss: reader.u32(),
  }
  const count = reader.u32()
  demand(count <= 4096 && bytes.length <= 1 << 20, 'TOO_LARGE', 'entries')
  demand(reader.left >= count * ENTRY + 96, 'TRUNCATED')
  record.entries = Array.from({ length: count }, () => readEntry(reader))
  record.accepted = record.entries.filter(({ verdict }) => verdict === 0)
  record.aggregator = reader.take(32)
  record.signature = reader.take(64)
  reader.end()
  return { ...record, bytes, digest: digest('record', bytes) }
}

/** The record of these bytes, checked by itself and against the run. */
function readRecord(bytes, run) {
  const record = parseRecord(bytes)
  checkFields(record)
  demand(same(record.runId, run.id), 'OTHER_RUN')
  demand(record.kind !== GENESIS || hex(record.stateRoot) === run.genesis_root, 'BAD_RECORD', 'the genesis state')
  demand(run.aggregators.includes(hex(record.aggregator)), 'NOT_AN_AGGREGATOR')
  checkSignature(record.aggregator, 'record', bytes.subarray(0, -64), record.signature)
  return record
}

function checkFields(record) {
  const { kind, reason, entries, accepted } = record
  const must = (holds, why) => demand(holds, 'BAD_RECORD', why)
  const isZero = bytes => bytes.every(byte => byte === 0)
  must(kind <= ROLLBACK && reason <= OPERATOR && entries.every(({ verdict }) => verdict <= 2), 'an unknown kind')
  must(record.closed >= record.opened, 'it closed before it opened')
  const names = entries.map(({ peer, packet }) => join([peer, packet]))
  must(names.every((name, i) => i === 0 || Buffer.compare(names[i - 1], name) < 0), 'the order of the entries')
  must(accepted.length <= 1024, 'too many accepted')
  must(accepted.every(({ peer }, i) => i === 0 || !same(accepted[i - 1].peer, peer)), 'two accepted of one peer')
  for (const { verdict, code, weight, clip } of entries) {
    const counts = code === 0 && weight >= 1 && weight <= 4096 && clip >= 1 && clip <= 65536
    must(verdict === 0 ? counts : code > 0 && weight === 0 && clip === 0, 'an entry')
  }
  must((record.round === 0) === (kind === GENESIS) && (reason === 0) === (kind === GENESIS), 'the genesis record')
  must(kind !== GENESIS || (isZero(record.previous) && isZero(record.amendment) && entries.length === 0), 'the genesis record')
  must((accepted.length > 0) === (kind === APPLIED) && isZero(record.update) === (kind !== APPLIED), 'what was applied')
  must(kind !== NULL || reason === DEADLINE, 'a null record has the reason deadline')
  must((kind === ROLLBACK) === (reason === OPERATOR), 'a rollback, and no other record, has the reason operator')
  must(record.loss ? record.evaluated < record.round : record.evaluated === 0, 'the loss of a later state')
}

/** May `record` follow `previous`? */
function checkLink(previous, record) {
  demand(record.round === previous.round + 1 && same(record.previous, previous.digest), 'BROKEN_CHAIN')
  demand(record.epoch >= previous.epoch, 'BROKEN_CHAIN', 'the epoch is lower')
  demand(record.kind !== NULL || same(record.stateRoot, previous.stateRoot), 'BAD_STATE')
}

const AMENDABLE = ['compression', 'inner', 'outer', 'rounds']
const ACTIONS = { settings: ['changes'], pause: [], resume: [], rollback: ['to_round'], ban: ['peer'], unban: ['peer'] }
const ORDINAL = whole(1, 2 ** 32 - 1)
const NEVER = 2 ** 32 // above all rounds

/** The changes of an amendment: [[[table, name, value], ...], canonical text]. */
function readChanges(changes) {
  const isTable = changes !== null && typeof changes === 'object' && !Array.isArray(changes) && !(changes instanceof Digits)
  demand(isTable && Object.keys(changes).length > 0, 'BAD_AMENDMENT', 'changes')
  const list = [], texts = []
  for (const key of Object.keys(changes).sort()) {
    const [table, name] = key.split(/\.(.*)/s), known = AMENDABLE.includes(table) && Object.hasOwn(TABLES[table], name ?? '')
    demand(known, 'BAD_AMENDMENT', `${key} cannot change`)
    const [value, valueText] = readValue(key, changes[key], TABLES[table][name], 'BAD_AMENDMENT')
    list.push([table, name, value])
    texts.push(`${JSON.stringify(key)}:${valueText}`)
  }
  return [list, `{${texts.join()}}`]
}

/** The amendment of these bytes, checked by itself and against the run. */
function readAmendment(bytes, run) {
  const reader = startOf(bytes, 'SLAM', 10)
  const size = reader.u32()
  demand(size + 74 <= 64 << 10, 'TOO_LARGE', 'an amendment')
  const json = reader.take(size)
  const signature = reader.take(64)
  reader.end()
  const source = json.toString('latin1'), must = (holds, why) => demand(holds, 'BAD_AMENDMENT', why)
  let document
  try { document = parseJson(source) } catch (error) { throw new Refused('BAD_AMENDMENT', error.message) }
  must(document !== null && typeof document === 'object' && typeof document.action === 'string', 'the action')
  must(Object.hasOwn(ACTIONS, document.action), 'the action')
  const own = ACTIONS[document.action], keys = ['action', 'number', 'previous', 'round', 'run_id', ...own].sort()
  must(Object.keys(document).sort().join() === keys.join(), 'the keys of the amendment')
  const amendment = {}, texts = {}
  const read = (name, rule) => { [amendment[name], texts[name]] = readValue(name, document[name], rule, 'BAD_AMENDMENT') }
  read('action', oneOf(document.action))
  for (const name of ['number', 'round']) read(name, ORDINAL)
  for (const name of ['previous', 'run_id', ...own.filter(key => key === 'peer')]) read(name, HASH)
  if (own.includes('to_round')) read('to_round', whole(0, amendment.round - 1))
  if (own.includes('changes')) [amendment.changes, texts.changes] = readChanges(document.changes)
  must(`{${keys.map(key => `"${key}":${texts[key]}`).join()}}` === source, 'the json is not canonical')
  demand(amendment.run_id === hex(run.id), 'OTHER_RUN')
  checkSignature(unhex(run.operator), 'amendment', json, signature)
  return { ...amendment, digest: digest('amendment', bytes) }
}

/** What holds in a round, in the order in which the later overrides. */
const inForce = (amendments, round) =>
  amendments.filter(item => item.round <= round).sort((a, b) => a.round - b.round || a.number - b.number)

/** The run with the settings of a round. */
function amendedRun(run, amendments, round) {
  const changed = { ...run }
  for (const { changes = [] } of inForce(amendments, round)) {
    for (const [table, name, value] of changes) changed[table] = { ...changed[table], [name]: value }
  }
  return derive(changed)
}

function bannedAt(amendments, round) {
  const last = new Map(inForce(amendments, round).filter(({ peer }) => peer).map(({ peer, action }) => [peer, action]))
  return [...last.keys()].filter(peer => last.get(peer) === 'ban').sort()
}

const rollbackAt = (amendments, round) =>
  amendments.findLast(item => item.action === 'rollback' && item.round === round)?.to_round ?? null

/** The round that a pause holds shut, and all after it. */
function pausedFrom(amendments) {
  const last = amendments.findLast(({ action }) => action === 'pause' || action === 'resume')
  return last?.action === 'pause' ? last.round : NEVER
}
const newestOf = amendments => amendments.at(-1)?.digest ?? zeros(32)

/** A chain with one more amendment. */
function append(run, amendments, amendment) {
  const must = (holds, why) => demand(holds, 'BAD_AMENDMENT', why)
  const before = amendments.length ? newestOf(amendments) : run.id, paused = pausedFrom(amendments)
  must(amendment.number === amendments.length + 1 && amendment.previous === hex(before), 'it does not follow')
  must(amendment.action !== 'pause' || paused === NEVER, 'a pause stands already')
  must(amendment.action !== 'resume' || paused === amendment.round, 'it ends no pause')
  const chain = [...amendments, amendment]
  for (const { round } of chain) {
    const { grace_s_min: least, grace_s_max: most, deadline_s: deadline } = amendedRun(run, chain, round).rounds
    must(least <= most && most <= deadline, 'the times of a round are out of order')
  }
  return chain
}

/** Amendments after those of a chain up to the one with this digest, oldest first. Yields the digest of each, takes its bytes. */
function * trace(run, known, head) {
  const found = []
  while (!same(head, newestOf(known))) {
    demand(!same(head, zeros(32)), 'BAD_AMENDMENT', 'the amendments do not go on from the known ones')
    const bytes = yield head
    demand(same(digest('amendment', bytes), head), 'WRONG_DIGEST', 'an amendment')
    found.unshift(readAmendment(bytes, run))
    head = found[0].number > 1 ? unhex(found[0].previous) : zeros(32)
  }
  return found
}

/** The chain of a record, from that of the record before it. */
function bringIn(run, known, record, brought) {
  demand(brought.length <= 64, 'BAD_AMENDMENT', 'more than 64 at once')
  let chain = known
  for (const amendment of brought) {
    const shut = amendment.action === 'rollback' && record.round >= pausedFrom(chain)
    const soon = amendment.action === 'resume' || shut
    demand(amendment.round >= record.round + (soon ? 0 : 1), 'BAD_AMENDMENT', 'it comes too late')
    chain = append(run, chain, amendment)
  }
  demand(same(record.amendment, newestOf(chain)), 'BAD_AMENDMENT', 'the record names another amendment')
  return keeping(chain, record)
}

/** The chain of a record whose state is loaded. */
const wholeChain = (run, record, all) => keeping(all.reduce((chain, item) => append(run, chain, item), []), record)

function keeping(chain, record) {
  demand(record.round < pausedFrom(chain), 'BAD_AMENDMENT', 'the round was held shut')
  demand((record.kind === ROLLBACK) === (rollbackAt(chain, record.round) !== null), 'BAD_AMENDMENT', 'a rollback out of turn')
  const banned = bannedAt(chain, record.round)
  demand(!record.accepted.some(({ peer }) => banned.includes(hex(peer))), 'BANNED', 'an accepted packet')
  return chain
}

// ------------------------------------------------------------------------------- 9. Joining

const transcript = (runId, peer, clientNonce, serverNonce, certificate) => join([runId, peer, clientNonce, serverNonce, certificate])

// ------------------------------------------------------------------------------- 10. DHT records

const addressBytes = list => join([Buffer.of(list.length), ...list.flatMap(text => [Buffer.of(text.length), Buffer.from(text)])])
const readTexts = reader => Array.from({ length: reader.u8() }, () => reader.take(reader.u8()).toString('latin1'))

const signedByDht = (key, subkey, value) => join([Buffer.from(key), Buffer.of(0), subkey, value])

function makeDhtRecord(keyText, key, expires, { certificate, round, head, addresses }) {
  const payload = join([certificate, u32(round), head, addressBytes(addresses)])
  const kind = keyText.endsWith('/aggregators') ? 1 : 2
  const open = join([Buffer.from('SLDR'), u16(1), Buffer.of(kind), u64(expires), u16(payload.length), payload])
  return join([open, key.sign('dht', signedByDht(keyText, key.public, open))])
}

function readDhtRecord(keyText, subkey, bytes, expiration, now) {
  const kind = /^slp\/[0-9a-f]{64}\/(aggregators|peers)$/.exec(keyText)?.[1]
  demand(kind, 'BAD_DHT_KEY', keyText)
  const must = (holds, why) => demand(holds, 'BAD_DHT_RECORD', why)
  must(bytes.length >= 81 && bytes.length <= 1024 && bytes.subarray(0, 4).toString('latin1') === 'SLDR', 'no record')
  const reader = new Reader(bytes, 4, 'BAD_DHT_RECORD')
  const version = reader.u16(), kindByte = reader.u8(), expires = reader.u64()
  const payload = new Reader(reader.take(reader.u16()), 0, 'BAD_DHT_RECORD')
  const signature = reader.take(64)
  reader.end('BAD_DHT_RECORD')
  demand(version === 1, 'VERSION')
  must(kindByte === (kind === 'aggregators' ? 1 : 2), 'the kind does not fit the key')
  const ahead = expires - BigInt(now)
  demand(expires === BigInt(expiration) && ahead >= 30n && ahead <= 1800n, 'BAD_EXPIRY')
  checkSignature(subkey, 'dht', signedByDht(keyText, subkey, bytes.subarray(0, -64)), signature)
  const record = { certificate: payload.take(32), round: payload.u32(), head: payload.take(32), addresses: readTexts(payload) }
  payload.end('BAD_DHT_RECORD')
  must(record.addresses.every(isAddress), 'an address')
  return record
}

// ------------------------------------------------------------------------------- 11. Bundles

/** The packets of an applied record, all checked and merged to the sections of its update. */
function readBundle(run, record, baseRoot, bytes) {
  const reader = new Reader(bytes), form = packetForm(run), most = wireBytesMax(run, form)
  demand(bytes.length <= record.accepted.length * (most + 4), 'TOO_LARGE', 'a bundle')
  const wires = record.accepted.map(() => {
    const size = reader.u32()
    demand(size <= most, 'TOO_LARGE', 'a packet')
    return reader.take(size)
  })
  reader.end()
  const packets = wires.map((wire, i) => {
    const { header, sections } = fromWire(run, wire, form)
    demand(same(digest('packet', header), record.accepted[i].packet), 'WRONG_DIGEST', 'a packet of the bundle')
    checkPacket(run, header, sections, record.round, baseRoot)
    return sections
  })
  const { k, code_bits: codeBits } = run.compression
  const merged = run.layout.tensors.map(({ size }, tensor) => {
    const parts = record.accepted.map(({ weight, clip }, i) => ({ ...decodeSection(packets[i][tensor], size, k, codeBits), weight, clip }))
    return encodeUpdateSection(merge(parts, size, run.outer.rule, run.alphaQ16))
  })
  const header = makeUpdate(run, record.round, baseRoot, record.stateRoot, merged)
  demand(same(digest('update', header), record.update), 'WRONG_DIGEST', 'the packets do not lead to the update')
  return merged
}

// ------------------------------------------------------------------------------- 12. Round rules

/** A replica's view: the head, all heads so far, and the round at which it began or last loaded a state. */
const startChain = (head, amendments) => ({ head, amendments, since: head.round, followed: new Set([hex(head.digest)]) })

function follows(previous, record) {
  try { checkLink(previous, record) } catch { return false }
  return true
}

/** What a record that is sound by itself means for the holder of a chain. */
function judge({ head, since, followed }, record) {
  if (followed.has(hex(record.digest))) return 'known'
  if (record.epoch < head.epoch) return 'lower'
  if (follows(head, record)) return record.kind === ROLLBACK ? 'rollback' : 'next'
  if (record.round > head.round + 1) return 'gap'
  if (record.epoch > head.epoch) return 'branch'
  return record.round < since ? 'old' : 'second'
}

/** Make `record` the head, either by its update or by loading its state. */
function moveTo(chain, record, amendments, loaded) {
  Object.assign(chain, { head: record, amendments })
  if (loaded) chain.since = record.round
  chain.followed.add(hex(record.digest))
}

/** The inner steps to do in an open round: none unless it continues from the state of the record that is held. */
function stepsFor(signedRun, chain, { round, baseRoot, innerSteps }) {
  const run = amendedRun(signedRun, chain.amendments, chain.head.round + 1)
  const continues = round === chain.head.round + 1 && same(baseRoot, chain.head.stateRoot) && round <= run.outer.rounds
  return continues ? Math.min(Math.max(1, innerSteps), run.inner.steps) : 0
}

const isAccepted = (record, round, packetDigest) =>
  record.round === round && record.accepted.some(({ packet }) => same(packet, packetDigest))
const worthAnotherTry = code => [CODES.BUSY, CODES.WRONG_DIGEST, CODES.BAD_SESSION].includes(code)

// ------------------------------------------------------------------------------- 13. Invites and addresses

const HOST = /^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])$/

function isAddress(address) {
  const [, host, port] = /^(.*):([1-9][0-9]{0,4})$/.exec(address) ?? []
  return host !== undefined && HOST.test(host) && Number(port) <= 65535 && address.length <= 255
}
const isBootstrap = address => address.length <= 255 && /^(\/[A-Za-z0-9.:_-]+)+\/p2p\/[A-Za-z0-9]+$/.test(address)

const sumOf = body => digest('invite', body).subarray(0, 4)

function inviteText({ runId, aggregator, certificate, addresses, bootstraps }) {
  const body = join([runId, aggregator, certificate, addressBytes(addresses), addressBytes(bootstraps)])
  return 'slp1' + join([body, sumOf(body)]).toString('base64url')
}

function readInvite(invite) {
  const must = (holds, why) => demand(holds, 'BAD_INVITE', `${why}; copy the whole invite again`)
  must(invite.length <= 4096, 'this is too long')
  const word = invite.replace(/[ \t\r\n]/g, '')
  must(/^slp1[A-Za-z0-9_-]+$/.test(word) && word.length <= 2048, 'this is no invite')
  const reader = new Reader(Buffer.from(word.slice(4), 'base64url'), 0, 'BAD_INVITE')
  const found = {
    runId: reader.take(32), aggregator: reader.take(32), certificate: reader.take(32), addresses: readTexts(reader),
    bootstraps: readTexts(reader),
  }
  must(found.addresses.length + found.bootstraps.length > 0, 'it names no address')
  must(found.addresses.every(isAddress) && found.bootstraps.every(isBootstrap), 'an address is malformed')
  must(isKey(found.aggregator) && inviteText(found) === word, 'a letter is wrong')
  return found
}

// ------------------------------------------------------------------------------- The line protocol (README.md)

const floats = bytes => new Float32Array(new Uint8Array(bytes).buffer) // copied, because a view has to be aligned

/** Bytes as hexadecimal, wherever they are in an answer. */
function plain(value) {
  if (Buffer.isBuffer(value)) return hex(value)
  if (Array.isArray(value)) return value.map(plain)
  if (typeof value !== 'object' || value === null) return value
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, plain(part)]))
}

/** What a section means: the SHA-256 of index and value of each position. */
function contents({ indices, values }) {
  const bytes = Buffer.alloc(8 * indices.length)
  indices.forEach((index, i) => bytes.writeFloatLE(values[i], bytes.writeUInt32LE(index, 8 * i)))
  return { count: indices.length, sha256: sha256(bytes) }
}

/** The settings that amendments may change, as canonical JSON. */
function settingsText(run) {
  const valueText = (value, rule) => rule.kind === 'real' ? realText(value) : JSON.stringify(value)
  const tableText = table => Object.keys(run[table]).sort().map(key => `"${key}":${valueText(run[table][key], TABLES[table][key])}`)
  return `{${AMENDABLE.map(table => `"${table}":{${tableText(table).join()}}`).join()}}`
}

const CHECKS = {
  key: q => checkKey(q.bytes),
  signature: q => checkSignature(q.key, q.domain, q.message, q.bytes),
  run: q => {
    const run = readSignedRun(q.bytes, q.run_id)
    return { run_id: run.id, alpha_q16: run.alphaQ16, nominal_tokens: run.nominal, values: run.layout.size }
  },
  section: q => {
    const { indices, values } = decodeSection(q.bytes, q.size, q.k, q.code_bits)
    return contents({ indices, values: values.map(value => value * UNIT) })
  },
  'update-section': q => contents(decodeUpdateSection(q.bytes, q.size)),
  packet: q => {
    checkPacket(q.run, q.header, q.sections, q.round, q.base_root)
    return { digest: digest('packet', q.header) }
  },
  'packet-wire': q => fromWire(q.run, q.bytes, packetForm(q.run)),
  update: q => {
    checkUpdate(q.run, q.header, q.sections, q.digest)
    return { digest: digest('update', q.header) }
  },
  'update-wire': q => fromWire(q.run, q.bytes, updateForm(q.run)),
  bundle: q => ({ sections: readBundle(q.run, readRecord(q.record, q.run), q.base_root, q.bytes) }),
  record: q => {
    const { digest, round, epoch, kind, accepted } = readRecord(q.bytes, q.run)
    return { digest, round, epoch, kind, accepted: accepted.map(({ packet }) => packet) }
  },
  link: q => checkLink(parseRecord(q.previous), parseRecord(q.bytes)),
  rollback: q => demand(same(parseRecord(q.bytes).stateRoot, parseRecord(q.target).stateRoot), 'BAD_STATE'),
  amendment: q => {
    const { digest, number, round } = readAmendment(q.bytes, q.run)
    return { digest, number, round }
  },
  amendments: q => {
    const known = q.known.reduce((chain, item) => append(q.run, chain, readAmendment(item, q.run)), [])
    const brought = q.amendments.map(item => readAmendment(item, q.run))
    const chain = bringIn(q.run, known, readRecord(q.record, q.run), brought)
    const facts = round => ({
      settings: settingsText(amendedRun(q.run, chain, round)), banned: bannedAt(chain, round),
      paused: round >= pausedFrom(chain), rollback: rollbackAt(chain, round),
    })
    return { head: newestOf(chain), rounds: q.rounds.map(facts) }
  },
  dht: q => {
    const { certificate, round, head, addresses } = readDhtRecord(q.key, q.subkey, q.bytes, q.expiration, q.now)
    return { certificate, round, digest: head, addresses }
  },
  invite: q => {
    const { runId, ...rest } = readInvite(q.text)
    return { run_id: runId, ...rest }
  },
  challenge: q => {
    const proven = transcript(q.run_id, q.peer, q.client_nonce, q.server_nonce, q.certificate)
    checkSignature(q.aggregator, 'join-aggregator', proven, q.bytes)
  },
}

const MAKES = {
  acc: q => ({ acc: asBytes(accumulate(q.beta, floats(q.residual), floats(q.outer), floats(q.local))) }),
  compress: q => {
    const { sparse, residual } = compress(floats(q.acc), q.k, q.code_bits)
    return { section: encodeSection(sparse, q.k, q.code_bits), residual_sha256: sha256(asBytes(residual)) }
  },
  weight: q => ({ weight: weightOf(q.tokens, q.nominal) }),
  merge: q => {
    const contributions = q.sections.map((section, i) =>
      ({ ...decodeSection(section, q.size, q.k, q.code_bits), weight: q.weights[i], clip: q.clips[i] }))
    return { section: encodeUpdateSection(merge(contributions, q.size, q.rule, q.alpha_q16)) }
  },
  apply: q => {
    const outer = floats(q.outer)
    applyUpdate(outer, q.section)
    return { outer: asBytes(outer) }
  },
  merkle: q => ({ root: merkleRoot(q.leaves) }),
  'state-root': q => {
    const size = q.values.length * q.repeat, hashes = []
    for (let at = 0; at < size; at += PIECE) {
      const turned = join([q.values.subarray(at % q.values.length), q.values.subarray(0, at % q.values.length)])
      hashes.push(leafHash(Buffer.alloc(Math.min(PIECE, size - at), turned)))
    }
    return { root: rootOfHashes(hashes) }
  },
  packet: q => {
    const header = makePacket(q.run, privateKey(q.seed), q.round, q.base_root, q.tokens, q.inner_steps, q.sections)
    return { header, digest: digest('packet', header) }
  },
  update: q => {
    const header = makeUpdate(q.run, q.round, q.base_root, q.new_root, q.sections)
    return { header, digest: digest('update', header) }
  },
  dht: q => ({ bytes: makeDhtRecord(q.key, privateKey(q.seed), q.expires, { ...q, head: q.digest }) }),
  invite: q => ({ text: inviteText({ ...q, runId: q.run_id }) }),
  proof: q => {
    const key = privateKey(q.seed)
    const proven = transcript(q.run_id, key.public, q.client_nonce, q.server_nonce, q.certificate)
    return { bytes: key.sign('join-peer', join([proven, q.aggregator])) }
  },
}

/** What a replica makes of records, open rounds and receipts; its packets are made as soon as a round can be trained for. */
function follow(q) {
  const stored = new Map(q.amendments.map(bytes => [hex(digest('amendment', bytes)), bytes]))
  const fetched = missing => {
    let step = missing.next()
    while (!step.done) {
      const bytes = stored.get(hex(step.value))
      demand(bytes, 'NOT_FOUND', 'an amendment')
      step = missing.next(bytes)
    }
    return step.value
  }
  const held = readRecord(q.held, q.run)
  const chain = startChain(held, wholeChain(q.run, held, fetched(trace(q.run, [], held.amendment))))
  const ready = new Map(q.packets.map(([round, packet]) => [round, unhex(packet)]))
  const settled = []
  let waiting = null
  const makeNext = () => {
    const round = chain.head.round + 1
    waiting = ready.has(round) ? { round, packet: ready.get(round) } : null
    ready.delete(round)
  }
  const onRecord = bytes => {
    const record = readRecord(bytes, q.run)
    const decision = judge(chain, record)
    if (!['next', 'rollback', 'branch'].includes(decision)) return decision
    const known = decision === 'branch' ? [] : chain.amendments, found = fetched(trace(q.run, known, record.amendment))
    const amendments = decision === 'branch' ? wholeChain(q.run, record, found) : bringIn(q.run, known, record, found)
    if (waiting) settled.push([waiting.round, isAccepted(record, waiting.round, waiting.packet)])
    moveTo(chain, record, amendments, decision === 'branch')
    makeNext()
    return decision
  }
  const decide = ({ record, opened, receipt }) => {
    if (record !== undefined) return refusalOf(() => onRecord(unhex(record)))
    if (receipt !== undefined) return worthAnotherTry(receipt) ? 'again' : 'rest'
    const open = { round: opened.round, baseRoot: unhex(opened.base_root), innerSteps: opened.inner_steps }
    return waiting ? 0 : stepsFor(q.run, chain, open)
  }
  makeNext()
  const decisions = q.events.map(decide)
  return { decisions, settled, head: chain.head.digest, state_root: chain.head.stateRoot }
}

/** The result of `work`, or the number of the code that it is refused with. */
function refusalOf(work) {
  try { return work() } catch (error) {
    if (error instanceof Refused) return CODES[error.code]
    throw error
  }
}

const BYTES = [ // the fields of requests that are bytes, in hexadecimal
  'bytes', 'key', 'message', 'run_id', 'base_root', 'new_root', 'header', 'digest', 'record', 'previous', 'subkey', 'peer',
  'client_nonce', 'server_nonce', 'certificate', 'aggregator', 'residual', 'outer', 'local', 'acc', 'section', 'values', 'seed', 'held',
  'target',
]

function answer(request) {
  const { verb, kind } = request
  const work = verb === 'follow' ? follow : (verb === 'check' ? CHECKS : verb === 'make' ? MAKES : {})[kind]
  if (!work) return { unsupported: true }
  const q = { ...request }
  for (const name of BYTES) if (typeof q[name] === 'string' && !(kind === 'dht' && name === 'key')) q[name] = unhex(q[name])
  for (const name of ['sections', 'leaves', 'known', 'amendments']) if (q[name]) q[name] = q[name].map(unhex)
  if (q.run) q.run = readRun(Buffer.from(q.run))
  try {
    return { ok: work(q) ?? {} }
  } catch (error) {
    if (error instanceof Refused) return { refused: CODES[error.code] }
    if (error instanceof RangeError && kind === 'compress') return { refused: 0 }
    throw error
  }
}

async function conform() {
  for await (const line of createInterface({ input: process.stdin })) console.log(JSON.stringify(plain(answer(JSON.parse(line)))))
}

// ------------------------------------------------------------------------------- Training: a Llama-style decoder

/** x[T, I] times the transpose of w[O, I]. */
function linear(x, w, T, I, O) {
  const y = new Float32Array(T * O)
  for (let t = 0; t < T; t++) {
    for (let o = 0; o < O; o++) {
      let dot = 0
      for (let i = 0, a = t * I, b = o * I; i < I; i++) dot += x[a + i] * w[b + i]
      y[t * O + o] = dot
    }
  }
  return y
}

/** Adds the gradient of w to dw and returns that of x. */
function linearBack(dy, x, w, dw, T, I, O) {
  const dx = new Float32Array(T * I)
  for (let t = 0; t < T; t++) {
    for (let o = 0; o < O; o++) {
      const slope = dy[t * O + o]
      if (slope === 0) continue
      for (let i = 0, a = t * I, b = o * I; i < I; i++) {
        dx[a + i] += slope * w[b + i]
        dw[b + i] += slope * x[a + i]
      }
    }
  }
  return dx
}

const add = (a, b) => a.map((value, i) => value + b[i])
const inverseNorm = (row, eps) => 1 / Math.sqrt(row.reduce((total, value) => total + value * value, 0) / row.length + eps)

function norm(x, g, eps) {
  const size = g.length, y = new Float32Array(x.length)
  for (let at = 0; at < x.length; at += size) {
    const scale = inverseNorm(x.subarray(at, at + size), eps)
    for (let i = 0; i < size; i++) y[at + i] = x[at + i] * scale * g[i]
  }
  return y
}

function normBack(dy, x, g, dg, eps) {
  const size = g.length, dx = new Float32Array(x.length)
  for (let at = 0; at < x.length; at += size) {
    const scale = inverseNorm(x.subarray(at, at + size), eps)
    let along = 0
    for (let i = 0; i < size; i++) {
      dg[i] += dy[at + i] * x[at + i] * scale
      along += dy[at + i] * g[i] * x[at + i]
    }
    for (let i = 0; i < size; i++) dx[at + i] = scale * (dy[at + i] * g[i] - x[at + i] * along * scale * scale / size)
  }
  return dx
}

/** Turn each pair (x[i], x[i + W/2]) of each head by its position's angle, in place; backwards with the direction -1. */
function rotate(x, T, heads, W, theta, direction) {
  for (let t = 0; t < T; t++) {
    for (let i = 0; i < W / 2; i++) {
      const angle = t * theta ** (-2 * i / W), cos = Math.cos(angle), sin = direction * Math.sin(angle)
      for (let h = 0, at = t * heads * W + i; h < heads; h++, at += W) {
        const first = x[at], second = x[at + W / 2]
        x[at] = first * cos - second * sin
        x[at + W / 2] = second * cos + first * sin
      }
    }
  }
  return x
}

/** Calls visit(h, t, row of q, column of k, s) for every pair of positions s <= t of every head. */
function attend({ T, heads, shared, W }, visit) {
  for (let h = 0; h < heads; h++) {
    const own = Math.floor(h * shared / heads)
    for (let t = 0; t < T; t++) {
      for (let s = 0; s <= t; s++) visit((h * T + t) * T + s, (t * heads + h) * W, (s * shared + own) * W)
    }
  }
}

/** softmax(q k / sqrt(W)) over the positions up to one's own: probabilities [heads, T, T]. */
function attention(q, k, size) {
  const { T, heads, W } = size, p = new Float32Array(heads * T * T)
  attend(size, (at, a, b) => {
    let dot = 0
    for (let i = 0; i < W; i++) dot += q[a + i] * k[b + i]
    p[at] = dot / Math.sqrt(W)
  })
  for (let row = 0; row < heads * T; row++) softmax(p.subarray(row * T, row * T + row % T + 1))
  return p
}

function softmax(row) {
  const most = row.reduce((a, b) => Math.max(a, b))
  let total = 0
  for (let i = 0; i < row.length; i++) total += row[i] = Math.exp(row[i] - most)
  for (let i = 0; i < row.length; i++) row[i] /= total
  return row
}

function attentionBack(dout, { q, k, v, p }, size) {
  const { T, heads, W } = size
  const dq = new Float32Array(q.length), dk = new Float32Array(k.length), dv = new Float32Array(v.length), dp = new Float32Array(p.length)
  attend(size, (at, a, b) => {
    let dot = 0
    for (let i = 0; i < W; i++) {
      dot += dout[a + i] * v[b + i]
      dv[b + i] += p[at] * dout[a + i]
    }
    dp[at] = dot
  })
  const means = Float32Array.from({ length: heads * T }, (_, row) => {
    let mean = 0
    for (let at = row * T; at < (row + 1) * T; at++) mean += p[at] * dp[at]
    return mean
  })
  attend(size, (at, a, b) => {
    const slope = p[at] * (dp[at] - means[Math.floor(at / T)]) / Math.sqrt(W)
    for (let i = 0; i < W; i++) {
      dq[a + i] += slope * k[b + i]
      dk[b + i] += slope * q[a + i]
    }
  })
  return { dq, dk, dv }
}

const sigmoid = value => 1 / (1 + Math.exp(-value))

/** The mean loss in nats of predicting each token from those before it; its exact gradient is added to `g`. */
export function lossAndGradient(config, w, g, tokens) {
  const T = tokens.length - 1, D = config.hidden_size, F = config.intermediate_size, eps = config.rms_norm_eps
  const heads = config.num_attention_heads, shared = config.num_key_value_heads, W = D / heads
  const size = { T, heads, shared, W }, KV = shared * W, theta = config.rope_theta
  const embedding = 'model.embed_tokens.weight', output = config.tie_word_embeddings ? embedding : 'lm_head.weight'
  let x = new Float32Array(T * D)
  for (let t = 0; t < T; t++) x.set(w[embedding].subarray(tokens[t] * D, (tokens[t] + 1) * D), t * D)
  const layers = []
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    const name = part => `model.layers.${layer}.${part}.weight`
    const n1 = norm(x, w[name('input_layernorm')], eps)
    const q = rotate(linear(n1, w[name('self_attn.q_proj')], T, D, D), T, heads, W, theta, 1)
    const k = rotate(linear(n1, w[name('self_attn.k_proj')], T, D, KV), T, shared, W, theta, 1)
    const v = linear(n1, w[name('self_attn.v_proj')], T, D, KV)
    const p = attention(q, k, size), mixed = new Float32Array(T * D)
    attend(size, (at, a, b) => { for (let i = 0; i < W; i++) mixed[a + i] += p[at] * v[b + i] })
    const middle = add(x, linear(mixed, w[name('self_attn.o_proj')], T, D, D))
    const n2 = norm(middle, w[name('post_attention_layernorm')], eps)
    const gate = linear(n2, w[name('mlp.gate_proj')], T, D, F), up = linear(n2, w[name('mlp.up_proj')], T, D, F)
    const active = gate.map((value, i) => value * sigmoid(value) * up[i])
    layers.push({ name, x, n1, q, k, v, p, mixed, middle, n2, gate, up, active })
    x = add(middle, linear(active, w[name('mlp.down_proj')], T, F, D))
  }
  const last = norm(x, w['model.norm.weight'], eps), V = config.vocab_size
  const logits = linear(last, w[output], T, D, V)
  let loss = 0
  for (let t = 0; t < T; t++) { // from logits to their gradient, in place
    const row = softmax(logits.subarray(t * V, (t + 1) * V))
    loss -= Math.log(row[tokens[t + 1]]) / T
    row[tokens[t + 1]] -= 1
    for (let i = 0; i < V; i++) row[i] /= T
  }
  let dx = normBack(linearBack(logits, last, w[output], g[output], T, D, V), x, w['model.norm.weight'], g['model.norm.weight'], eps)
  for (const { name, ...kept } of layers.reverse()) {
    const back = (dy, input, part, I, O) => linearBack(dy, input, w[name(part)], g[name(part)], T, I, O)
    const dactive = back(dx, kept.active, 'mlp.down_proj', F, D)
    const dup = dactive.map((slope, i) => slope * kept.gate[i] * sigmoid(kept.gate[i]))
    const dgate = dactive.map((slope, i) => {
      const s = sigmoid(kept.gate[i])
      return slope * kept.up[i] * s * (1 + kept.gate[i] * (1 - s))
    })
    const dn2 = add(back(dgate, kept.n2, 'mlp.gate_proj', D, F), back(dup, kept.n2, 'mlp.up_proj', D, F))
    const ffn = 'post_attention_layernorm', own = 'input_layernorm'
    dx = add(dx, normBack(dn2, kept.middle, w[name(ffn)], g[name(ffn)], eps))
    const { dq, dk, dv } = attentionBack(back(dx, kept.mixed, 'self_attn.o_proj', D, D), kept, size)
    const dn1 = [
      back(rotate(dq, T, heads, W, theta, -1), kept.n1, 'self_attn.q_proj', D, D),
      back(rotate(dk, T, shared, W, theta, -1), kept.n1, 'self_attn.k_proj', D, KV),
      back(dv, kept.n1, 'self_attn.v_proj', D, KV),
    ].reduce(add)
    dx = add(dx, normBack(dn1, kept.x, w[name(own)], g[name(own)], eps))
  }
  for (let t = 0; t < T; t++) for (let i = 0; i < D; i++) g[embedding][tokens[t] * D + i] += dx[t * D + i]
  return loss
}

/** Names and sizes of all parameters of a model. */
function parametersOf(config) {
  const { hidden_size: D, intermediate_size: F, vocab_size: V, num_attention_heads: heads, num_key_value_heads: shared } = config
  const KV = D / heads * shared
  const layer = {
    input_layernorm: D, post_attention_layernorm: D, 'self_attn.q_proj': D * D, 'self_attn.k_proj': KV * D, 'self_attn.v_proj': KV * D,
    'self_attn.o_proj': D * D, 'mlp.gate_proj': D * F, 'mlp.up_proj': D * F, 'mlp.down_proj': D * F,
  }
  const sizes = { 'model.embed_tokens.weight': V * D, 'model.norm.weight': D, ...!config.tie_word_embeddings && { 'lm_head.weight': V * D } }
  for (let i = 0; i < config.num_hidden_layers; i++) {
    for (const [part, size] of Object.entries(layer)) sizes[`model.layers.${i}.${part}.weight`] = size
  }
  return sizes
}

/** Views of a flat array by the names of the tensors. */
const views = (flat, layout) => Object.fromEntries(layout.tensors.map(({ name, offset, size }) => [name, flat.subarray(offset, offset + size)]))

/** AdamW with the run's settings; the moments live as long as the program. */
class Optimizer {
  constructor(run) { Object.assign(this, { run, own: 0, first: new Float32Array(run.layout.size), second: new Float32Array(run.layout.size) }) }

  rate(step) {
    const { learning_rate: peak, warmup_steps: warmup, schedule, min_lr_ratio: least, steps } = this.run.inner
    const rate = peak * Math.min(1, (this.own + 1) / Math.max(1, warmup))
    if (schedule === 'constant') return rate
    const done = Math.min(1, Math.max(0, (step - warmup) / Math.max(1, steps * this.run.outer.rounds - warmup)))
    return rate * (least + (1 - least) * 0.5 * (1 + Math.cos(Math.PI * done)))
  }

  step(values, gradient, step) {
    const { adam_beta1: b1, adam_beta2: b2, adam_eps: eps, weight_decay: decay, grad_clip_norm: most } = this.run.inner
    const rate = this.rate(step), size = Math.sqrt(gradient.reduce((total, slope) => total + slope * slope, 0))
    const clip = Math.min(1, most / (size + 1e-6))
    this.own++
    for (const { offset, size: length, shape } of this.run.layout.tensors) {
      for (let i = offset; i < offset + length; i++) {
        const slope = gradient[i] * clip
        this.first[i] += (1 - b1) * (slope - this.first[i])
        this.second[i] += (1 - b2) * (slope * slope - this.second[i])
        const root = Math.sqrt(this.second[i] / (1 - b2 ** this.own)) + eps
        values[i] -= rate * (this.first[i] / (1 - b1 ** this.own) / root + (shape.length > 1 ? decay * values[i] : 0))
      }
    }
  }
}

// ------------------------------------------------------------------------------- The wire: protobuf and gRPC by hand

const varint = value => {
  const bytes = []
  for (; value >= 128; value = Math.floor(value / 128)) bytes.push(value % 128 | 128)
  return Buffer.from([...bytes, value])
}
const numberField = (number, value) => join([varint(number * 8), varint(value)])
const bytesField = (number, value) => join([varint(number * 8 + 2), varint(value.length), value])

/** A protobuf message as { field number: Number or Buffer }; of a repeated field the last. */
function fieldsOf(message) {
  const reader = new Reader(message, 0, 'BAD_MESSAGE'), fields = {}
  const readVarint = () => {
    let value = 0
    for (let scale = 1; ; scale *= 128) {
      const byte = reader.u8()
      value += (byte & 127) * scale
      demand(scale <= 2 ** 63, 'BAD_MESSAGE')
      if (byte < 128) return value
    }
  }
  while (reader.left) {
    const key = readVarint(), kind = key % 8
    demand([0, 1, 2, 5].includes(kind), 'BAD_MESSAGE', 'a field of an unknown kind')
    fields[Math.floor(key / 8)] = kind === 0 ? readVarint() : reader.take(kind === 2 ? readVarint() : kind === 1 ? 8 : 4)
  }
  return fields
}

const areBytes = (...values) => demand(values.every(Buffer.isBuffer), 'BAD_MESSAGE', 'a field is missing or of another kind')

/** The connection is down, refused or silent; another try may help. */
class LinkError extends Error {}
const SILENCE_MS = 30000
const MESSAGE_MAX = 2 << 20

/** One gRPC call over HTTP/2: `send` messages, read them from `messages()`. */
class Call {
  constructor(session, method) {
    if (session.destroyed || session.closed) throw new LinkError('the connection is closed')
    this.trailers = {}
    this.stream = session.request({
      ':method': 'POST', ':path': `/sparseloco.v1.Swarm/${method}`, 'content-type': 'application/grpc', te: 'trailers',
    })
    const note = headers => Object.assign(this.trailers, headers)
    this.stream.on('response', note).on('trailers', note).on('error', error => { this.failure = error })
    this.stream.setTimeout(SILENCE_MS, () => this.stream.destroy(new Error(`silent for ${SILENCE_MS / 1000} s`)))
  }

  send(message) {
    const size = Buffer.alloc(5)
    size.writeUInt32BE(message.length, 1)
    return new Promise(done => this.stream.write(join([size, message]), () => done()))
  }
  end() { this.stream.end() }
  cancel() { this.stream.close(http2.constants.NGHTTP2_CANCEL) }

  async * messages() {
    let held = zeros(0)
    try {
      for await (const part of this.stream) {
        held = join([held, part])
        while (held.length >= 5 && held.length >= 5 + held.readUInt32BE(1)) {
          const end = 5 + held.readUInt32BE(1)
          yield fieldsOf(held.subarray(5, end))
          held = held.subarray(end)
        }
        demand(held.length < 5 || (held[0] === 0 && held.readUInt32BE(1) <= MESSAGE_MAX), 'BAD_MESSAGE')
      }
    } catch (error) {
      if (error instanceof Refused) throw error
      throw new LinkError(`the connection was cut: ${(this.failure ?? error).message}`)
    } finally {
      if (!this.stream.closed) this.cancel()
    }
    this.checkStatus()
  }

  checkStatus() {
    const { 'grpc-status': status, 'grpc-message': message, 'sl-code': code } = this.trailers
    const name = Object.keys(CODES).find(name => String(CODES[name]) === code)
    if (name) throw new Refused(name, `the aggregator says: ${decodeURIComponent(message ?? '')}`)
    if (status !== '0') throw new LinkError(`the call failed: ${decodeURIComponent(message ?? 'the connection was cut')}`)
  }
}

/** The only, or the next, message of a call. */
async function next(messages) {
  const { value, done } = await messages.next()
  if (done) throw new LinkError('the aggregator ended the call too early')
  return value
}

/** A joined connection to one aggregator. */
class Link {
  /** Connect, compare the certificate with the invite's, prove both keys. */
  static async open(address, invite, key, plaintext) {
    const [, host, port] = /^\[?(.*?)\]?:(\d+)$/.exec(address)
    const local = ['127.0.0.1', '::1', 'localhost'].includes(host)
    if (plaintext && !local) throw new LinkError(`${address} is not this machine: without TLS only the loopback interface is dialled`)
    const socket = plaintext ? net.connect(Number(port), host) :
      tls.connect({ host, port: Number(port), rejectUnauthorized: false, ALPNProtocols: ['h2'], minVersion: 'TLSv1.2' })
    await new Promise((ready, failed) => {
      socket.setTimeout(SILENCE_MS, () => failed(new LinkError(`${address} does not answer`)))
      socket.once(plaintext ? 'connect' : 'secureConnect', ready)
      socket.once('error', error => failed(new LinkError(`cannot reach ${address}: ${error.message}`)))
    })
    socket.setTimeout(0)
    const certificate = plaintext ? zeros(32) : sha256(socket.getPeerCertificate().raw)
    if (!plaintext && !same(certificate, invite.certificate)) {
      socket.destroy()
      throw new Refused('NOT_AN_AGGREGATOR', `the certificate of ${address} is not the one that the invite names; ask for a fresh invite`)
    }
    const link = new Link()
    link.session = http2.connect(`${plaintext ? 'http' : 'https'}://${host}:${port}`, { createConnection: () => socket })
    link.session.on('error', () => {}) // every call reports it by itself
    try { await link.join(invite, key, certificate) } catch (error) {
      link.close()
      throw error
    }
    return link
  }

  async join(invite, key, certificate) {
    const call = new Call(this.session, 'Join'), replies = call.messages(), nonce = randomBytes(32)
    const hello = [numberField(1, 1), bytesField(2, invite.runId), bytesField(3, key.public), bytesField(4, nonce)]
    call.send(bytesField(1, join(hello)))
    const { 1: challenge } = await next(replies)
    areBytes(challenge)
    const { 1: theirs, 2: aggregator, 3: signature } = fieldsOf(challenge)
    areBytes(theirs, aggregator, signature)
    demand(theirs.length === 32, 'BAD_MESSAGE', 'a nonce has 32 bytes')
    demand(same(aggregator, invite.aggregator), 'NOT_AN_AGGREGATOR', 'not the aggregator of the invite answers')
    const proven = transcript(invite.runId, key.public, nonce, theirs, certificate)
    checkSignature(aggregator, 'join-aggregator', proven, signature)
    call.send(bytesField(2, bytesField(1, key.sign('join-peer', join([proven, aggregator])))))
    call.end()
    const { 2: welcome } = await next(replies)
    areBytes(welcome)
    const { 1: token, 2: head } = fieldsOf(welcome)
    areBytes(token, head)
    Object.assign(this, { token, head })
    await replies.return()
  }

  /** Yields { closed } and { opened } as they happen. */
  async * watch() {
    const call = new Call(this.session, 'Watch')
    call.send(bytesField(1, this.token))
    call.end()
    for await (const { 2: opened, 3: closed } of call.messages()) {
      if (closed !== undefined) {
        areBytes(closed)
        const { 1: record, 2: updateBytes = 0, 3: bundleBytes = 0 } = fieldsOf(closed)
        areBytes(record)
        yield { closed: { record, updateBytes, bundleBytes } }
      } else if (opened !== undefined) {
        areBytes(opened)
        const { 1: round, 2: baseRoot, 3: innerSteps = 0, 4: closesInMs = 0 } = fieldsOf(opened)
        areBytes(baseRoot)
        yield { opened: { round, baseRoot, innerSteps, closesInMs } }
      }
    }
  }

  /** A whole blob of at most `most` bytes; the caller checks its digest. */
  async fetch(kind, name, most) {
    const call = new Call(this.session, 'Fetch'), parts = []
    call.send(join([bytesField(1, this.token), bytesField(2, Buffer.from(kind)), bytesField(3, name)]))
    call.end()
    let size = null, got = 0
    for await (const { 1: whole = 0, 2: data = zeros(0) } of call.messages()) {
      areBytes(data)
      size ??= whole
      parts.push(data)
      got += data.length
      demand(size <= most && got <= size, 'TOO_LARGE', `${kind} ${hex(name)}`)
    }
    if (got !== size) throw new LinkError(`${kind} ${hex(name)} ends too early`)
    return join(parts)
  }

  /** Offer a packet; the code of the receipt, 0 when it is accepted. */
  async submit(name, wire) {
    const call = new Call(this.session, 'Submit'), replies = call.messages()
    call.send(bytesField(1, join([bytesField(1, this.token), bytesField(2, name), numberField(3, wire.length)])))
    let reply = await next(replies)
    if (!reply[2]) {
      for (let at = 0; at < wire.length; at += 1 << 20) await call.send(bytesField(2, wire.subarray(at, at + (1 << 20))))
      call.end() // the aggregator answers when it sees the end
      reply = await next(replies)
    }
    areBytes(reply[2])
    const { 1: named, 2: accepted = 0, 3: code = 0 } = fieldsOf(reply[2])
    areBytes(named)
    demand(same(named, name), 'BAD_MESSAGE', 'a receipt for something else')
    await replies.return()
    return accepted ? 0 : code
  }

  close() { this.session.destroy() }
}

// ------------------------------------------------------------------------------- The peer

const say = text => console.error(`${new Date().toISOString().slice(11, 19)}  ${text}`)

/** What must survive a crash: the state of `record`, the residual, and the packet that waits with what undoes it. */
class Replica {
  constructor(folder, run) {
    Object.assign(this, { path: joinPath(folder, 'replica.bin'), run, record: null, packet: null, outer: null })
    this.residual = new Float32Array(run.layout.size)
    if (!existsSync(this.path)) return
    try { this.load() } catch (error) { throw new Error(`${this.path} is damaged (${error.message}); delete it and join again`) }
  }

  load() {
    const bytes = readFileSync(this.path), size = this.run.layout.size * 4
    const reader = new Reader(bytes)
    const { record, packet } = JSON.parse(reader.take(reader.u32()).toString())
    const array = () => floats(reader.take(size))
    Object.assign(this, { record: readRecord(unhex(record), this.run), outer: array(), residual: array() })
    if (packet) this.packet = { round: packet.round, digest: unhex(packet.digest), undone: array(), wire: reader.take(reader.left) }
  }

  /** Written beside the old file and renamed over it, so that a crash leaves one of the two. */
  save() {
    const { record, packet } = this
    const names = { record: hex(record.bytes), packet: packet && { round: packet.round, digest: hex(packet.digest) } }
    const head = Buffer.from(JSON.stringify(names))
    const rest = packet ? [asBytes(packet.undone), packet.wire] : []
    const bytes = join([u32(head.length), head, asBytes(this.outer), asBytes(this.residual), ...rest])
    writeFileSync(this.path + '.part', bytes, { flush: true })
    renameSync(this.path + '.part', this.path)
  }

  /** Before the state moves on: the packet stands when the record lists it, else everything goes back into the residual. */
  settle(record) {
    if (!this.packet) return false
    const { round, digest: name, undone } = this.packet, stands = isAccepted(record, round, name)
    say(`round ${round}: the packet ${stands ? 'counts' : 'does not count and is kept for later'}`)
    if (!stands) this.residual = undone
    this.packet = null
    return stands
  }

  /** Inner steps that never became a packet are kept for later too. */
  fold(local) { this.residual = this.residual.map((value, i) => f32(value + f32(this.outer[i] - local[i]))) }
}

/** The state of a record, checked piece by piece. */
async function fetchState(link, run, record) {
  const size = run.layout.size * 4
  const hashes = await link.fetch('state', record.stateRoot, Math.ceil(size / PIECE) * 32)
  const names = Array.from({ length: Math.ceil(size / PIECE) }, (_, i) => hashes.subarray(32 * i, 32 * i + 32))
  demand(hashes.length === 32 * names.length && same(rootOfHashes(names), record.stateRoot), 'BAD_STATE', 'the piece hashes')
  const pieces = []
  for (const name of names) {
    const piece = await link.fetch('piece', name, PIECE)
    demand(same(leafHash(piece), name), 'BAD_STATE', 'a piece')
    pieces.push(piece)
  }
  const state = join(pieces)
  demand(state.length === size, 'BAD_STATE', 'the size of the state')
  return floats(state)
}

/** The sections of a record's update: from the packets where that is less, else, or when they do not fit, the update itself. */
async function fetchUpdate(link, run, previous, record, { updateBytes, bundleBytes }) {
  if (bundleBytes > 0 && bundleBytes < updateBytes) {
    try {
      const most = record.accepted.length * (wireBytesMax(run, packetForm(run)) + 4)
      return readBundle(run, record, previous.stateRoot, await link.fetch('bundle', record.digest, most))
    } catch (error) {
      if (!(error instanceof Refused)) throw error
      say(`the bundle of round ${record.round} does not fit (${error.message}); fetching the update`)
    }
  }
  const wire = await link.fetch('update', record.update, wireBytesMax(run, updateForm(run)))
  const { header, sections } = fromWire(run, wire, updateForm(run))
  checkUpdate(run, header, sections, record.update)
  return sections
}

class Peer {
  constructor(run, replica, key, tokens, rounds) {
    Object.assign(this, { run, replica, key, tokens, rounds, moved: 0, accepted: 0, optimizer: new Optimizer(run), work: null })
  }

  get finished() { return this.moved >= this.rounds || (this.chain && this.chain.head.round >= this.next.outer.rounds) }

  /** The run with the settings of the round after the head. */
  get next() { return amendedRun(this.run, this.chain.amendments, this.chain.head.round + 1) }

  /** What a trace asks for, from the aggregator. */
  async fetched(missing) {
    let step = missing.next()
    while (!step.done) step = missing.next(await this.link.fetch('amendment', step.value, 64 << 10))
    return step.value
  }

  async amendmentsOf(record) {
    return wholeChain(this.run, record, await this.fetched(trace(this.run, [], record.amendment)))
  }

  /** Take part over one link until it breaks or the work is done. */
  async takePart(link) {
    this.link = link
    const { record } = this.replica
    if (record && !this.chain) this.chain = startChain(record, await this.amendmentsOf(record))
    await this.onRecord(readRecord(link.head, this.run), {})
    for await (const { closed, opened } of link.watch()) {
      if (closed) await this.onRecord(readRecord(closed.record, this.run), closed)
      else this.onOpened(opened)
      if (this.finished) return
    }
  }

  async onRecord(record, sizes) {
    let decision = this.chain ? judge(this.chain, record) : 'first'
    const trail = decision === 'gap' ? await this.recordsBetween(record) : [record]
    if (decision === 'gap' && !follows(this.chain.head, trail[0]) && record.epoch === this.chain.head.epoch) decision = 'second'
    if (decision === 'second') say(`round ${record.round}: the aggregator signed another record in this epoch; the first one holds`)
    if (['known', 'lower', 'old', 'second'].includes(decision)) return
    const amendments = await this.amendmentsAfter(trail, decision)
    await this.stopWork()
    const { replica } = this, deciding = trail.find(({ round }) => round === replica.packet?.round) ?? record
    const outer = decision === 'next' ? await this.updated(record, amendments, sizes) : await fetchState(this.link, this.run, record)
    if (replica.settle(deciding)) this.accepted++
    Object.assign(replica, { record, outer }).save()
    if (this.chain) {
      moveTo(this.chain, record, amendments, decision !== 'next' && decision !== 'rollback')
      this.moved++
    } else this.chain = startChain(record, amendments)
    say(`round ${record.round}: the state has the root ${hex(record.stateRoot).slice(0, 16)}`)
  }

  /** The amendments of the last of these records, each checked with those that it brings in. */
  async amendmentsAfter(trail, decision) {
    if (!this.chain || decision === 'branch' || !follows(this.chain.head, trail[0])) return this.amendmentsOf(trail.at(-1))
    let { amendments } = this.chain
    for (const record of trail) {
      const found = await this.fetched(trace(this.run, amendments, record.amendment))
      for (const { number, action, round } of found) say(`amendment ${number}: ${action} from round ${round} on`)
      amendments = bringIn(this.run, amendments, record, found)
    }
    return amendments
  }

  /** The records after the head up to `record`, fetched backwards by their digests. */
  async recordsBetween(record) {
    const trail = [record]
    while (trail[0].round > this.chain.head.round + 1) {
      const { previous } = trail[0]
      const bytes = await this.link.fetch('record', previous, 1 << 20)
      demand(same(digest('record', bytes), previous), 'WRONG_DIGEST', 'a record')
      const before = readRecord(bytes, this.run)
      checkLink(before, trail[0])
      trail.unshift(before)
    }
    return trail
  }

  /** The parameters after a record that follows the head. */
  async updated(record, amendments, sizes) {
    const { replica } = this, outer = replica.outer.slice(), run = amendedRun(this.run, amendments, record.round)
    if (record.kind === NULL) return outer
    try {
      const sections = await fetchUpdate(this.link, run, this.chain.head, record, sizes)
      run.layout.tensors.forEach(({ offset, size }, i) => applyUpdate(outer.subarray(offset, offset + size), sections[i]))
      demand(same(stateRoot(outer), record.stateRoot), 'BAD_STATE', 'the update leads to another root than that of the record')
      return outer
    } catch (error) {
      if (!(error instanceof Refused)) throw error
      say(`round ${record.round}: ${error.message}; loading the state instead`)
      return fetchState(this.link, run, record)
    }
  }

  onOpened(open) {
    const { replica, work } = this
    if (work && !work.done && work.round === open.round) return // it began before the link was cut and goes on
    const waiting = replica.packet?.round === open.round
    const steps = replica.packet ? 0 : stepsFor(this.run, this.chain, open)
    if (!waiting && steps === 0) return
    const fresh = this.work = { round: open.round, stop: false, done: false, local: null }
    fresh.promise = this.contribute(fresh, open, steps)
      .catch(error => { say(`round ${open.round}: ${error.stack}`) })
      .finally(() => { fresh.done = true })
  }

  /** End what is under way, and keep what came of it. */
  async stopWork() {
    if (!this.work) return
    this.work.stop = true
    await this.work.promise
    if (this.work.local) this.replica.fold(this.work.local)
    this.work = null
  }

  async contribute(work, open, steps) {
    if (!this.replica.packet) {
      const { done, tokens, loss } = await this.train(work, open, steps)
      if (work.stop) return
      say(`round ${open.round}: ${done} of ${steps} inner steps, ${tokens} tokens, loss ${loss.toFixed(3)}`)
      if (!this.makePacket(work, open, done, tokens)) return
    }
    await this.send(work)
  }

  /** How long to train: as long as the last round was when all arrived in it, less when it closed without somebody. */
  budgetMs(open) {
    const { kind, reason, opened, closed } = this.chain.head
    const usual = kind === APPLIED ? (reason === COMPLETE ? 1 : 0.6) * Number(closed - opened) : 500 * this.next.rounds.grace_s_max
    return Math.min(usual, open.closesInMs / 2)
  }

  /** Sequences in an inner step: as many as the run asks for, fewer when four such steps would not fit. */
  batchSize(budgetMs) {
    if (!this.sequenceMs) return 1 // it shows how long one takes
    return Math.max(1, Math.min(this.next.inner.batch_size, Math.floor(budgetMs / 4 / this.sequenceMs)))
  }

  async train(work, open, steps) {
    const { replica, next: run } = this, length = run.data.sequence_length
    this.optimizer.run = run
    const budgetMs = this.budgetMs(open), until = Date.now() + budgetMs
    const gradient = new Float32Array(run.layout.size)
    work.local = replica.outer.slice()
    const values = views(work.local, run.layout), slopes = views(gradient, run.layout)
    let done = 0, tokens = 0, loss = 0
    while (done < steps && (done === 0 || Date.now() < until)) {
      const batch = this.batchSize(budgetMs), began = Date.now()
      gradient.fill(0)
      loss = 0
      for (let i = 0; i < batch; i++) {
        if (work.stop) return { done, tokens, loss }
        const start = Math.floor(Math.random() * (this.tokens.length - length))
        loss += lossAndGradient(run.model, values, slopes, this.tokens.subarray(start, start + length + 1)) / batch
        await breathe() // so that the connection stays alive
      }
      this.optimizer.step(work.local, gradient.map(slope => slope / batch), (open.round - 1) * run.inner.steps + done)
      this.sequenceMs = Math.max(1, (Date.now() - began) / batch)
      done += 1
      tokens += batch * length
    }
    return { done, tokens, loss }
  }

  /** Leaving loses nothing either. */
  async leave() {
    await this.stopWork()
    if (this.replica.record) this.replica.save()
  }

  /** Compress, sign and store the packet of a round; false when the inner steps diverged. */
  makePacket(work, open, done, tokens) {
    const { replica, next: run } = this, { k, code_bits: codeBits, beta } = run.compression
    const acc = accumulate(beta, replica.residual, replica.outer, work.local)
    work.local = null
    try {
      const sparse = run.layout.tensors.map(({ offset, size }) => compress(acc.slice(offset, offset + size), k, codeBits))
      const sections = sparse.map(part => encodeSection(part.sparse, k, codeBits))
      const header = makePacket(run, this.key, open.round, open.baseRoot, tokens, done, sections)
      run.layout.tensors.forEach(({ offset }, i) => replica.residual.set(sparse[i].residual, offset))
      replica.packet = { round: open.round, digest: digest('packet', header), undone: acc, wire: packetToWire(run, header, sections) }
    } catch (error) {
      if (!(error instanceof RangeError)) throw error
      say(`round ${open.round}: ${error.message}; the inner steps are thrown away`)
      this.optimizer = new Optimizer(run)
      return false
    }
    replica.save()
    return true
  }

  /** Offer the stored packet, always the same bytes, until there is an answer that stands or the round is over. */
  async send(work) {
    const { round, digest: name, wire } = this.replica.packet
    for (let pause = 1; !work.stop; pause = Math.min(30, 2 * pause)) {
      try {
        const code = await this.link.submit(name, wire)
        if (code === 0) return say(`round ${round}: the packet of ${wire.length} bytes arrived`)
        if (!worthAnotherTry(code)) return say(`round ${round}: the packet is refused with SL${code}`)
      } catch (error) {
        const again = error instanceof LinkError || worthAnotherTry(CODES[error.code])
        if (!again) return say(`round ${round}: the packet is refused: ${error.message}`)
      }
      for (let waited = 0; waited < pause && !work.stop; waited += 0.1) await sleep(100)
    }
  }
}

/** The peer's key: 32 random bytes as hexadecimal in a file of its own. */
function loadKey(path) {
  if (!existsSync(path)) writeFileSync(path, hex(randomBytes(32)) + '\n', { mode: 0o600, flag: 'wx' })
  const seed = readFileSync(path, 'utf8').trim()
  if (!/^[0-9a-f]{64}$/.test(seed)) throw new Error(`${path} is no key: it should hold 64 hexadecimal digits`)
  return privateKey(unhex(seed))
}

async function startPeer(link, invite, home, key, tokens, rounds) {
  const run = readSignedRun(await link.fetch('run', invite.runId, (4 << 20) + 74), invite.runId)
  if (run.data.tokenizer !== 'bytes') throw new Error('this run has a tokenizer of its own; this client knows bytes alone')
  const sizes = parametersOf(run.model), { tensors } = run.layout
  const fits = tensors.length === Object.keys(sizes).length && tensors.every(({ name, size }) => sizes[name] === size)
  if (!fits) throw new Error('the layout of this run is not that of its model')
  if (run.model.vocab_size < 256) throw new Error('the vocabulary is too small for bytes')
  if (tokens.length <= run.data.sequence_length + 1) throw new Error('the text is shorter than one sequence of the run')
  const folder = joinPath(home, hex(invite.runId).slice(0, 16))
  mkdirSync(folder, { recursive: true })
  say(`run ${run.name}, ${run.layout.size} values, key ${hex(key.public)}`)
  return new Peer(run, new Replica(folder, run), key, tokens, rounds)
}

async function joinRun(word, { home, text, rounds = Infinity, plaintextLocal }) {
  const invite = readInvite(existsSync(word) ? readFileSync(word, 'utf8') : word)
  const encrypted = invite.certificate.some(byte => byte !== 0)
  if (!encrypted && !plaintextLocal) throw new Error('the invite is for plaintext; on one machine, say --plaintext-local')
  if (!invite.addresses.length) throw new Error('the invite names no aggregator address, and this client has no DHT')
  const tokens = readFileSync(text) // one token a byte
  mkdirSync(home, { recursive: true })
  const key = loadKey(joinPath(home, 'peer.key'))
  let peer = null, link = null, leaving = false
  for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => { leaving = true; link?.close(); say('leaving') })
  for (let turn = 0, pause = 1; !leaving && !peer?.finished; turn++) {
    try {
      link = await Link.open(invite.addresses[turn % invite.addresses.length], invite, key, plaintextLocal)
      if (leaving) break
      peer ??= await startPeer(link, invite, home, key, tokens, rounds)
      pause = 1
      await peer.takePart(link)
    } catch (error) {
      const again = error instanceof LinkError || ['BUSY', 'BAD_SESSION', 'NOT_FOUND', 'WRONG_DIGEST'].includes(error.code)
      if (leaving) break
      if (!again) throw error
      say(`${error.message}; trying again in ${pause} s`)
      for (let waited = 0; waited < pause && !leaving; waited += 0.1) await sleep(100)
      pause = Math.min(30, 2 * pause)
    } finally {
      link?.close()
    }
  }
  if (peer) await peer.leave()
  say(peer ? `left after ${peer.moved} rounds; ${peer.accepted} packets counted` : 'left')
}

async function main([command, ...rest]) {
  if (command === 'conform') return conform()
  const options = {}
  while (rest.length) {
    const word = rest.shift()
    if (word === '--plaintext-local') options.plaintextLocal = true
    else if (['--home', '--text', '--rounds'].includes(word)) options[word.slice(2)] = rest.shift()
    else options.invite = word
  }
  const usage = 'client.mjs conform | client.mjs join INVITE --home DIR --text FILE [--rounds N] [--plaintext-local]'
  if (command !== 'join' || !options.invite || !options.home || !options.text) throw new Error(`usage: ${usage}`)
  if (options.rounds !== undefined && !(Number(options.rounds) >= 1)) throw new Error('--rounds is a number from 1')
  await joinRun(options.invite, { ...options, rounds: Number(options.rounds ?? Infinity) })
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  main(process.argv.slice(2)).catch(error => { // no process.exit, which would cut off what is still being written
    console.error(`error: ${error.message}`)
    process.exitCode = 1
  })
}
