import { invariant } from "../base/errors.ts";
import type { Gfn } from "../base/units.ts";
import {
  VIRTIO_IOMMU_S_DEVERR,
  VIRTIO_IOMMU_S_INVAL,
  VIRTIO_IOMMU_S_NOENT,
  VIRTIO_IOMMU_S_NOMEM,
  VIRTIO_IOMMU_S_OK,
} from "../wire/virtio-iommu.ts";
import { type Domain, Domains } from "./domains.ts";
import { framesOf, type Mapping } from "./mapping-trees.ts";
import { type Context, IN_BYPASS, IS_BLOCKED, type SoftwareIommu } from "./software-iommu.ts";

/** Who pins what domains map; the Tracker. */
export interface Holder {
  /** Pin the frames of a mapping, until letGo(). The status says why not: then none is newly pinned. */
  hold(mapping: Mapping): number;
  letGo(mappings: Iterable<Mapping>, kept?: boolean): void;
}

/**
 * Domains of endpoints: keeps in step what the driver asked for, what is pinned for it, and what devices can reach. An
 * endpoint is a device's number in the software IOMMU. Answers are statuses of VIRTIO 1.2 section 5.13.6.
 *
 * A device that keeps a DMA window open could still use what is taken away: then nothing is, and the answer is DEVERR.
 */
export class Remapping {
  readonly #iommu: SoftwareIommu;
  readonly #holder: Holder;
  readonly #domains = new Domains();
  /** What the addresses of a domain's devices mean. */
  readonly #contexts = new Map<Domain, Context>();
  #bypass = true;

  constructor(iommu: SoftwareIommu, holder: Holder) {
    this.#iommu = iommu;
    this.#holder = holder;
  }

  /** Mappings in all domains. */
  get mappings(): number {
    return this.#domains.mappings;
  }

  /** Whether those of `endpoints` that are attached to no domain are in bypass; otherwise they reach nothing. */
  setBypass(bypass: boolean, endpoints: Iterable<number>): void {
    this.#bypass = bypass;
    for (const endpoint of endpoints)
      if (!this.#domains.of(endpoint)) this.#iommu.setContext(endpoint, this.#unattached);
  }

  /** An endpoint is plugged. */
  add(endpoint: number): void {
    this.#iommu.setContext(endpoint, this.#unattached);
  }

  /** An endpoint is gone, and with it the domain that had no other. `kept` as in reset(). */
  remove(endpoint: number, kept = false): void {
    if (!this.#domains.of(endpoint)) return;
    this.#iommu.setContext(endpoint, this.#unattached);
    this.#leave(endpoint, kept);
  }

  attach(endpoint: number, id: number, bypass: boolean): number {
    const domain = this.#domains.domain(id);
    // Section 5.13.6.3: "If the domain already exists and the VIRTIO_IOMMU_ATTACH_F_BYPASS flag is not consistent with
    // that domain, the device SHOULD reject the request and set status to VIRTIO_IOMMU_S_INVAL."
    if (domain && domain.bypass !== bypass) return VIRTIO_IOMMU_S_INVAL;
    if (domain && domain === this.#domains.of(endpoint)) return VIRTIO_IOMMU_S_OK;
    const context = domain ? this.#contextOf(domain) : bypass ? IN_BYPASS : this.#newContext();
    if (context === undefined) return VIRTIO_IOMMU_S_NOMEM;
    // "If the endpoint identified by endpoint is already attached to another domain, then the device SHOULD first detach
    // it from that domain and attach it to the one identified by domain." At once, so that it is in bypass at no time.
    if (!this.#switch(endpoint, context)) {
      if (!domain) this.#destroy(context);
      return VIRTIO_IOMMU_S_DEVERR;
    }
    if (this.#domains.of(endpoint)) this.#leave(endpoint);
    this.#contexts.set(this.#domains.attach(endpoint, id, bypass), context);
    return VIRTIO_IOMMU_S_OK;
  }

  detach(endpoint: number, id: number): number {
    // Section 5.13.6.4: "If the domain identified by domain doesn't exist, or if the endpoint identified by endpoint isn't
    // attached to this domain, then the device MAY set the request status to VIRTIO_IOMMU_S_INVAL."
    if (this.#domains.of(endpoint)?.id !== id) return VIRTIO_IOMMU_S_INVAL;
    // "The device MUST ensure that after being detached from a domain, the endpoint cannot access any mapping from that
    // domain."
    if (!this.#switch(endpoint, this.#unattached)) return VIRTIO_IOMMU_S_DEVERR;
    this.#leave(endpoint);
    return VIRTIO_IOMMU_S_OK;
  }

  map(id: number, mapping: Mapping): number {
    const domain = this.#mappable(id);
    if (typeof domain === "number") return domain;
    const entered = this.#domains.map(domain, mapping);
    if (entered !== VIRTIO_IOMMU_S_OK) return entered;
    // Pinned first: from its entry on, devices reach a frame.
    const held = this.#holder.hold(mapping);
    if (held === VIRTIO_IOMMU_S_OK) {
      if (this.#iommu.tables.map(this.#rootOf(domain), mapping)) return VIRTIO_IOMMU_S_OK;
      this.#holder.letGo([mapping]);
    }
    this.#domains.unmap(domain, mapping);
    return held || VIRTIO_IOMMU_S_NOMEM;
  }

  /** `first` and `last`: pages. */
  unmap(id: number, first: number, last: number): number {
    const domain = this.#mappable(id);
    if (typeof domain === "number") return domain;
    const found = this.#domains.within(domain, first, last);
    if (typeof found === "number") return found;
    const root = this.#rootOf(domain);
    for (const mapping of found) this.#iommu.tables.unmap(root, mapping);
    if (found.length > 0 && !this.#iommu.quiesce()) {
      for (const mapping of found)
        invariant(this.#iommu.tables.map(root, mapping), "a table is gone while it is taken back");
      return VIRTIO_IOMMU_S_DEVERR;
    }
    for (const mapping of found) this.#domains.unmap(domain, mapping);
    this.#holder.letGo(found);
    return VIRTIO_IOMMU_S_OK;
  }

  /** Whether a page of the domain is mapped. */
  isMapped(id: number, page: number): boolean {
    const domain = this.#domains.domain(id);
    return domain !== undefined && this.#domains.find(domain, page) !== undefined;
  }

  /** Frames that are not there any more, though pinned: what maps one of them goes, as with VFIO. */
  forget(gfns: readonly Gfn[]): void {
    if (gfns.length === 0 || this.mappings === 0) return;
    const gone = new Set(gfns);
    for (const domain of this.#domains.all) {
      const found = [...this.#domains.mapped(domain)].filter((m) =>
        [...framesOf(m)].some((gfn) => gone.has(gfn)),
      );
      for (const mapping of found) {
        this.#iommu.tables.unmap(this.#rootOf(domain), mapping);
        this.#domains.unmap(domain, mapping);
      }
      this.#holder.letGo(found);
    }
  }

  /**
   * Section 5.13.5: "When the device is reset, endpoints are not attached to any domain." What only they had pinned goes,
   * or is `kept` until a table says what is in use.
   */
  reset(kept: boolean): void {
    const attached = [...this.#domains.all].flatMap((domain) => [...domain.endpoints]);
    for (const endpoint of attached) this.remove(endpoint, kept);
  }

  get #unattached(): Context {
    return this.#bypass ? IN_BYPASS : IS_BLOCKED;
  }

  /** Change what an endpoint's addresses mean. False, and nothing is changed, when it may still use the old meaning. */
  #switch(endpoint: number, context: Context): boolean {
    const domain = this.#domains.of(endpoint);
    this.#iommu.setContext(endpoint, context);
    if (this.#iommu.quiesce()) return true;
    this.#iommu.setContext(endpoint, domain ? this.#contextOf(domain) : this.#unattached);
    return false;
  }

  /** Detach an endpoint, which does not use its domain any more. */
  #leave(endpoint: number, kept = false): void {
    const domain = this.#domains.of(endpoint)!;
    const mappings = this.#domains.detach(endpoint);
    if (domain.endpoints.size > 0) return;
    for (const mapping of mappings) this.#iommu.tables.unmap(this.#rootOf(domain), mapping);
    this.#destroy(this.#contextOf(domain));
    this.#contexts.delete(domain);
    this.#holder.letGo(mappings, kept);
  }

  /** The domain, if it has mappings; or a status. */
  #mappable(id: number): Domain | number {
    const domain = this.#domains.domain(id);
    // Sections 5.13.6.5 and 5.13.6.6: "If domain does not exist, the device SHOULD [...] set status to
    // VIRTIO_IOMMU_S_NOENT." "If the domain is a bypass domain, the device SHOULD reject the request and set status to
    // VIRTIO_IOMMU_S_INVAL."
    if (!domain) return VIRTIO_IOMMU_S_NOENT;
    return domain.bypass ? VIRTIO_IOMMU_S_INVAL : domain;
  }

  #newContext(): Context | undefined {
    const root = this.#iommu.tables.create();
    return root === undefined ? undefined : { root };
  }

  #destroy(context: Context): void {
    if (typeof context === "object") this.#iommu.tables.destroy(context.root);
  }

  #contextOf(domain: Domain): Context {
    return this.#contexts.get(domain)!;
  }

  #rootOf(domain: Domain): number {
    const context = this.#contextOf(domain);
    invariant(typeof context === "object", `domain ${domain.id} has no table`);
    return context.root;
  }
}
