import { InvariantViolation } from "../base/errors.ts";
import { grown } from "../base/frame-index.ts";
import type { Gfn } from "../base/units.ts";

/** One MAP request: pages [first, last] of a domain's addresses to as many frames from `gfn` on. */
export interface Mapping {
  readonly first: number;
  /** Inclusive: the last page of all is 2^52 - 1. */
  readonly last: number;
  readonly gfn: Gfn;
  /** VIRTIO_IOMMU_MAP_F_*. */
  readonly flags: number;
}

/** The frames of a mapping, in order. */
export function* framesOf({ first, last, gfn }: Mapping): Generator<Gfn> {
  for (let frame = gfn as number; frame <= gfn + (last - first); frame++) yield frame as Gfn;
}

/** A tree: the node at its root, or EMPTY. */
export type Root = number & { readonly of: "mappings" };
export const EMPTY = 0 as Root;

/**
 * Sets of mappings that do not overlap, each an AVL tree over the mappings' first pages. The nodes of all trees are one
 * structure of arrays: 33 bytes for a mapping, however many pages it has. Every operation is O(log n).
 */
export class MappingTrees {
  #first = new Float64Array(16);
  #last = new Float64Array(16);
  #gfn = new Float64Array(16);
  #flags = new Uint8Array(16);
  #height = new Uint8Array(16);
  /** Of a node that is not in use: the next such node. */
  #left = new Int32Array(16);
  #right = new Int32Array(16);
  #free = 0;
  #fresh = 1;
  #size = 0;

  /** Mappings in all trees. */
  get size(): number {
    return this.#size;
  }

  /** Add a mapping that overlaps none of the tree's. Returns the tree's new root. */
  insert(root: Root, { first, last, gfn, flags }: Mapping): Root {
    const node = this.#allocate();
    this.#first[node] = first;
    this.#last[node] = last;
    this.#gfn[node] = gfn;
    this.#flags[node] = flags;
    this.#left[node] = this.#right[node] = EMPTY;
    this.#height[node] = 1;
    this.#size++;
    return this.#insert(root, node) as Root;
  }

  /** Remove the mapping that begins with page `first`. Returns the tree's new root. */
  remove(root: Root, first: number): Root {
    return this.#remove(root, first) as Root;
  }

  /** The first mapping that ends at `page` or behind it. */
  from(root: Root, page: number): Mapping | undefined {
    let found = EMPTY as number;
    for (let node = root as number; node !== EMPTY; ) {
      if (this.#last[node]! < page) node = this.#right[node]!;
      else {
        found = node;
        node = this.#left[node]!;
      }
    }
    if (found === EMPTY) return undefined;
    const [first, last, flags] = [this.#first[found]!, this.#last[found]!, this.#flags[found]!];
    return { first, last, gfn: this.#gfn[found]! as Gfn, flags };
  }

  #insert(root: number, node: number): number {
    if (root === EMPTY) return node;
    if (this.#first[node]! < this.#first[root]!) this.#left[root] = this.#insert(this.#left[root]!, node);
    else this.#right[root] = this.#insert(this.#right[root]!, node);
    return this.#balanced(root);
  }

  #remove(root: number, first: number): number {
    if (root === EMPTY) throw new InvariantViolation(`no mapping begins with page ${first}`);
    if (first < this.#first[root]!) this.#left[root] = this.#remove(this.#left[root]!, first);
    else if (first > this.#first[root]!) this.#right[root] = this.#remove(this.#right[root]!, first);
    else {
      const [left, right] = [this.#left[root]!, this.#right[root]!];
      this.#release(root);
      if (right === EMPTY) return left;
      let successor = right;
      while (this.#left[successor] !== EMPTY) successor = this.#left[successor]!;
      this.#right[successor] = this.#withoutFirst(right);
      this.#left[successor] = left;
      return this.#balanced(successor);
    }
    return this.#balanced(root);
  }

  /** The tree without its leftmost node, which is kept. */
  #withoutFirst(root: number): number {
    if (this.#left[root] === EMPTY) return this.#right[root]!;
    this.#left[root] = this.#withoutFirst(this.#left[root]!);
    return this.#balanced(root);
  }

  /** `root`, whose subtrees are balanced and differ by two levels at most, balanced. */
  #balanced(root: number): number {
    const lean = this.#lean(root);
    if (lean > 1) {
      if (this.#lean(this.#left[root]!) < 0) this.#left[root] = this.#rotateLeft(this.#left[root]!);
      return this.#rotateRight(root);
    }
    if (lean < -1) {
      if (this.#lean(this.#right[root]!) > 0) this.#right[root] = this.#rotateRight(this.#right[root]!);
      return this.#rotateLeft(root);
    }
    this.#measure(root);
    return root;
  }

  #rotateLeft(root: number): number {
    const right = this.#right[root]!;
    this.#right[root] = this.#left[right]!;
    this.#left[right] = root;
    this.#measure(root);
    this.#measure(right);
    return right;
  }

  #rotateRight(root: number): number {
    const left = this.#left[root]!;
    this.#left[root] = this.#right[left]!;
    this.#right[left] = root;
    this.#measure(root);
    this.#measure(left);
    return left;
  }

  #lean(node: number): number {
    return this.#height[this.#left[node]!]! - this.#height[this.#right[node]!]!;
  }

  #measure(node: number): void {
    this.#height[node] = 1 + Math.max(this.#height[this.#left[node]!]!, this.#height[this.#right[node]!]!);
  }

  #allocate(): number {
    if (this.#free > 0) {
      const node = this.#free;
      this.#free = this.#left[node]!;
      return node;
    }
    const node = this.#fresh++;
    if (node < this.#first.length) return node;
    const capacity = 2 * node;
    this.#first = grown(this.#first, capacity);
    this.#last = grown(this.#last, capacity);
    this.#gfn = grown(this.#gfn, capacity);
    this.#flags = grown(this.#flags, capacity);
    this.#height = grown(this.#height, capacity);
    this.#left = grown(this.#left, capacity);
    this.#right = grown(this.#right, capacity);
    return node;
  }

  #release(node: number): void {
    this.#left[node] = this.#free;
    this.#free = node;
    this.#size--;
  }
}
