// Replays the steps of a job (job.py has its format) on a WebAssembly module of kernels: driver.mjs MODULE JOB OUTPUT
import { readFileSync, writeFileSync } from "node:fs";

const [, , module, path, result] = process.argv;
const job = readFileSync(path);
let at = 0;
const int32 = () => job.readInt32LE((at += 4) - 4);
const int64 = () => Number(job.readBigInt64LE((at += 8) - 8));
const bytes = (size) => job.subarray(at, (at += size));

const { exports } = (await WebAssembly.instantiate(readFileSync(module), {})).instance;
const { memory, __indirect_function_table: table } = exports;
if (exports.il_abi() !== 2) throw new Error("the module has another ABI");

let top = exports.__heap_base.value;
const take = (size) => {
  const here = Math.ceil(top / 64) * 64;
  top = here + size;
  const lacking = top - memory.buffer.byteLength;
  if (lacking > 0) memory.grow(Math.ceil(lacking / 65536));
  return here;
};
const write = (address, data) => new Uint8Array(memory.buffer).set(data, address);

const [calls, steps] = [int32(), int32()];
const sizes = [int64(), int64(), int64(), int64()];
const [output, outputBytes] = [int64(), int64()];
const bases = sizes.map(take);
write(bases[0], bytes(sizes[0]));

// An il_call is 21 words of 32 bits: a function's place in the table, 16 pointers, dim, tile, mult, flags.
const plan = take(calls * 84);
const dims = take(32);
const places = new Map();
const place = (symbol) => {
  if (!places.has(symbol)) {
    places.set(symbol, table.grow(1));
    table.set(places.get(symbol), exports[symbol]);
  }
  return places.get(symbol);
};
for (let i = 0; i < calls; i++) {
  const words = new Int32Array(memory.buffer, plan + i * 84, 21);
  words[0] = place(bytes(64).toString("latin1").replace(/\0.*$/, ""));
  words.set([int32(), int32(), int32()], 17);
  const count = int32();
  const spaces = Array.from({ length: 16 }, int64);
  const offsets = Array.from({ length: 16 }, int64);
  for (let j = 0; j < count; j++) words[1 + j] = bases[spaces[j]] + offsets[j];
}
const outputs = [];
for (let i = 0; i < steps; i++) {
  write(dims, bytes(32));
  write(bases[3], bytes(sizes[3]));
  if (exports.il_step(plan, calls, dims) !== 0) throw new Error("the step failed");
  outputs.push(Buffer.from(memory.buffer.slice(bases[1] + output, bases[1] + output + outputBytes)));
}
writeFileSync(result, Buffer.concat(outputs));
