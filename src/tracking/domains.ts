import { invariant } from "../base/errors.ts";
import {
  VIRTIO_IOMMU_S_INVAL,
  VIRTIO_IOMMU_S_NOMEM,
  VIRTIO_IOMMU_S_OK,
  VIRTIO_IOMMU_S_RANGE,
} from "../wire/virtio-iommu.ts";
import { EMPTY, type Mapping, MappingTrees, type Root } from "./mapping-trees.ts";

/** Mappings of one guest, in all domains: what VFIO's type 1 driver allows a container (dma_entry_limit). */
export const MAPPINGS_MAX = 65_535;

/** An address space of endpoints. Its mappings are of `Domains`, which alone changes it. */
export interface Domain {
  readonly id: number;
  /** Made with VIRTIO_IOMMU_ATTACH_F_BYPASS: addresses are guest physical ones, and there are no mappings. */
  readonly bypass: boolean;
  readonly endpoints: ReadonlySet<number>;
}

interface Own extends Domain {
  readonly endpoints: Set<number>;
  mappings: Root;
}

/**
 * Which endpoint is attached to which domain, and the mappings of each domain (VIRTIO 1.2 section 5.13.6): data alone,
 * for other parts to act upon. Addresses are in pages of 4 KiB, so that 64 bits of them are exact.
 *
 * A domain has an endpoint at least, so there are never more of them than endpoints, which are the assigned functions:
 * no other bound is needed.
 */
export class Domains {
  readonly #mappingsMax: number;
  readonly #domains = new Map<number, Own>();
  readonly #attached = new Map<number, Own>();
  readonly #trees = new MappingTrees();

  constructor(mappingsMax = MAPPINGS_MAX) {
    this.#mappingsMax = mappingsMax;
  }

  get all(): Iterable<Domain> {
    return this.#domains.values();
  }
  /** Mappings in all domains. */
  get mappings(): number {
    return this.#trees.size;
  }

  domain(id: number): Domain | undefined {
    return this.#domains.get(id);
  }

  /** The domain that an endpoint is attached to. */
  of(endpoint: number): Domain | undefined {
    return this.#attached.get(endpoint);
  }

  /** Attach an endpoint, which is attached to no domain, to domain `id`; the domain is made if there is none. */
  attach(endpoint: number, id: number, bypass: boolean): Domain {
    const domain = this.#domains.get(id) ?? { id, bypass, endpoints: new Set(), mappings: EMPTY };
    invariant(!this.#attached.has(endpoint), `endpoint ${endpoint} is attached twice`);
    invariant(domain.bypass === bypass, `domain ${id} is${bypass ? " not" : ""} a bypass domain`);
    domain.endpoints.add(endpoint);
    this.#domains.set(id, domain);
    this.#attached.set(endpoint, domain);
    return domain;
  }

  /** Detach an attached endpoint. Returns what its domain mapped, if the domain has ceased to exist with it. */
  detach(endpoint: number): Mapping[] {
    const domain = this.#attached.get(endpoint);
    invariant(domain, `endpoint ${endpoint} is not attached`);
    this.#attached.delete(endpoint);
    domain.endpoints.delete(endpoint);
    if (domain.endpoints.size > 0) return [];
    const mappings = [...this.mapped(domain)];
    for (const mapping of mappings) this.unmap(domain, mapping);
    this.#domains.delete(domain.id);
    return mappings;
  }

  /** Add a mapping. The status says why not. */
  map(domain: Domain, mapping: Mapping): number {
    const own = domain as Own;
    const next = this.#trees.from(own.mappings, mapping.first);
    // Section 5.13.6.5: "If a mapping already exists in the requested range, the device SHOULD reject the request and
    // set status to VIRTIO_IOMMU_S_INVAL."
    if (next && next.first <= mapping.last) return VIRTIO_IOMMU_S_INVAL;
    if (this.#trees.size >= this.#mappingsMax) return VIRTIO_IOMMU_S_NOMEM;
    own.mappings = this.#trees.insert(own.mappings, mapping);
    return VIRTIO_IOMMU_S_OK;
  }

  /** Remove a mapping of the domain. */
  unmap(domain: Domain, mapping: Mapping): void {
    const own = domain as Own;
    own.mappings = this.#trees.remove(own.mappings, mapping.first);
  }

  /** The mappings in [first, last], which an UNMAP of this range removes; or a status, when it must not. */
  within(domain: Domain, first: number, last: number): Mapping[] | typeof VIRTIO_IOMMU_S_RANGE {
    const found: Mapping[] = [];
    for (const mapping of this.mapped(domain, first)) {
      if (mapping.first > last) break;
      // Section 5.13.6.6: "If a mapping affected by the range is not covered in its entirety by the range (the UNMAP
      // request would split the mapping), then the device SHOULD set the request status to VIRTIO_IOMMU_S_RANGE, and
      // SHOULD NOT remove any mapping."
      if (mapping.first < first || mapping.last > last) return VIRTIO_IOMMU_S_RANGE;
      found.push(mapping);
    }
    return found;
  }

  /** The mapping of a page. */
  find(domain: Domain, page: number): Mapping | undefined {
    const mapping = this.#trees.from((domain as Own).mappings, page);
    return mapping && mapping.first <= page ? mapping : undefined;
  }

  /** The domain's mappings that end at page `from` or behind it, in order. It must not change meanwhile. */
  *mapped(domain: Domain, from = 0): Generator<Mapping> {
    for (let page = from; ; ) {
      const mapping = this.#trees.from((domain as Own).mappings, page);
      if (!mapping) return;
      yield mapping;
      page = mapping.last + 1;
    }
  }
}
