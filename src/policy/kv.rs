//! Keys and values of running sequences, in blocks that sequences with the same beginning share.
//!
//! Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023; the index of
//! prefixes is a chain of digests, one a block.

use std::{cmp::Reverse, collections::HashMap, sync::Arc};

use candle_core::Result;

use sha2::{Digest, Sha256};

use crate::completion::Version;

use super::{
    architecture::{Architecture, Heads},
    attention::{BLOCK, Past, Store, write_block},
    device::Placement,
};

/// Keys and values of [`BLOCK`] places in all layers.
#[derive(Debug)]
pub(crate) struct Block {
    /// `[layers, 2, kv_heads · head_dim · BLOCK]`, laid out as [`Past`] has them; none where the device holds them.
    values: Vec<f32>,
    /// The device's store, and the first of its places that are this block's.
    stored: Option<(Arc<Store>, usize)>,
}

impl Block {
    fn new(architecture: &Architecture) -> Self {
        let columns = architecture.kv_heads * architecture.head_dim;
        Self { values: vec![0f32; architecture.layers * 2 * columns * BLOCK], stored: None }
    }

    fn layer(&self, layer: usize, size: usize) -> (&[f32], &[f32]) {
        self.values[layer * 2 * size..(layer + 1) * 2 * size].split_at(size)
    }
}

/// Keys and values of the tokens that one sequence has passed so far.
#[derive(Debug, Default)]
pub struct KvCache {
    /// Full blocks, which others may read too.
    shared: Vec<Arc<Block>>,
    /// Blocks that are being filled.
    own: Vec<Block>,
    len: usize,
}

impl KvCache {
    /// An empty cache with blocks for `places`, from a pool of its own.
    #[cfg(test)]
    pub(crate) fn of(architecture: &Architecture, placement: &Placement, places: usize) -> Result<Self> {
        let tokens = places.next_multiple_of(BLOCK);
        let mut pool = Pool::new(architecture, tokens, placement)?;
        let own = (0..tokens / BLOCK).filter_map(|_| pool.take()).collect();
        Ok(Self { own, ..Self::default() })
    }

    fn held(&self) -> impl Iterator<Item = &Block> {
        self.shared.iter().map(|block| &**block).chain(&self.own)
    }

    /// Where the device holds the keys and values, if it does: the store, and where in it each place is.
    pub(crate) fn stored(&self) -> Option<(&Arc<Store>, Vec<usize>)> {
        let blocks: Option<Vec<_>> = self.held().map(|block| block.stored.as_ref()).collect();
        let blocks = blocks?;
        let (store, _) = blocks.first()?;
        Some((store, blocks.iter().flat_map(|(_, first)| *first..first + BLOCK).collect()))
    }

    /// Places that are filled.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Blocks that it holds.
    pub(crate) fn blocks(&self) -> usize {
        self.shared.len() + self.own.len()
    }

    /// Places that it has blocks for.
    pub(crate) fn room(&self) -> usize {
        self.blocks() * BLOCK
    }

    pub(crate) fn give(&mut self, block: Block) {
        self.own.push(block);
    }

    /// Continues with a block that somebody else has filled. Only for a cache that ends where a block ends.
    pub(crate) fn adopt(&mut self, block: Arc<Block>) {
        self.shared.push(block);
        self.len += BLOCK;
    }

    /// Writes one layer's rows behind the last place. [`KvCache::advance`] follows, once all layers are written.
    pub(crate) fn write(&mut self, layer: usize, (mut k, mut v): (&[f32], &[f32]), heads: Heads) {
        let columns = heads.keys * heads.dim;
        let size = columns * BLOCK;
        let mut place = self.len;
        while !k.is_empty() {
            let taken = k.len().min((BLOCK - place % BLOCK) * columns);
            let block = &mut self.own[place / BLOCK - self.shared.len()];
            let parts = block.values[layer * 2 * size..(layer + 1) * 2 * size].split_at_mut(size);
            write_block(parts, place % BLOCK, (&k[..taken], &v[..taken]), heads);
            (k, v, place) = (&k[taken..], &v[taken..], place + taken / columns);
        }
    }

    pub(crate) fn advance(&mut self, places: usize) {
        self.len += places;
    }

    pub(crate) fn past(&self, layer: usize, heads: Heads) -> Past<'_> {
        let size = heads.keys * heads.dim * BLOCK;
        Past { blocks: self.held().map(|block| block.layer(layer, size)).collect() }
    }
}

/// Names the tokens up to the end of a block, and the version that has read them.
pub(crate) type Name = [u8; 32];

/// The name of a block of `tokens` that follows the block `before`; `None` begins with the version instead.
pub(crate) fn name(before: Option<&Name>, version: Version, tokens: &[u32]) -> Name {
    let mut digest = Sha256::new();
    match before {
        Some(before) => digest.update(before),
        None => digest.update(version.0.to_le_bytes()),
    }
    for token in tokens {
        digest.update(token.to_le_bytes());
    }
    digest.finalize().into()
}

/// All blocks that there are: those in use, those kept for requests with the same beginning, and the spare ones.
#[derive(Debug)]
pub(crate) struct Pool {
    architecture: Architecture,
    /// Blocks at most.
    capacity: usize,
    /// Blocks that exist; memory is taken when it is first needed.
    made: usize,
    spare: Vec<Block>,
    /// Where the device holds keys and values: all of the memory, from the start.
    store: Option<Arc<Store>>,
    kept: HashMap<Name, Kept>,
    /// Sequences that have come to their end.
    clock: u64,
    /// Kept blocks that were given up for room.
    pub(crate) evicted: u64,
}

#[derive(Debug)]
struct Kept {
    block: Arc<Block>,
    /// What the clock said when it was last wanted.
    used: u64,
    /// Blocks before it. Of those wanted last at one time the end of a prefix is given up before its beginning.
    depth: usize,
}

impl Kept {
    /// No sequence reads it now.
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.block) == 1
    }
}

impl Pool {
    /// For `tokens` places, in whole blocks.
    pub(crate) fn new(architecture: &Architecture, tokens: usize, placement: &Placement) -> Result<Self> {
        let capacity = (tokens / BLOCK).max(1);
        let columns = architecture.kv_heads * architecture.head_dim;
        let store = || Store::new(architecture.layers, capacity * BLOCK, columns, placement);
        Ok(Self {
            architecture: architecture.clone(),
            capacity,
            store: (!placement.has_slices()).then(store).transpose()?.map(Arc::new),
            made: 0,
            spare: Vec::new(),
            kept: HashMap::new(),
            clock: 0,
            evicted: 0,
        })
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks that can be had, those included that would be evicted.
    pub(crate) fn available(&self) -> usize {
        self.capacity - self.made + self.spare.len() + self.idle()
    }

    /// Blocks that are kept though nobody reads them now.
    pub(crate) fn idle(&self) -> usize {
        self.kept.values().filter(|kept| kept.is_idle()).count()
    }

    /// A block to write to; the kept one that was idle longest if there is no other. `None` if all are in use.
    pub(crate) fn take(&mut self) -> Option<Block> {
        if let Some(block) = self.spare.pop() {
            return Some(block);
        }
        if self.made < self.capacity {
            self.made += 1;
            let Some(store) = &self.store else { return Some(Block::new(&self.architecture)) };
            let first = (self.made - 1) * BLOCK;
            return Some(Block { values: Vec::new(), stored: Some((Arc::clone(store), first)) });
        }
        let idle = self.kept.iter().filter(|(_, kept)| kept.is_idle());
        let oldest = *idle.min_by_key(|(_, kept)| (kept.used, Reverse(kept.depth)))?.0;
        self.evicted += 1;
        self.kept.remove(&oldest).and_then(|kept| Arc::into_inner(kept.block))
    }

    /// The block of this name, if it is kept.
    pub(crate) fn find(&mut self, name: &Name) -> Option<Arc<Block>> {
        let kept = self.kept.get_mut(name)?;
        kept.used = self.clock;
        Some(Arc::clone(&kept.block))
    }

    /// Shares the full blocks of `cache` under the names of its first blocks; without a name they stay its own.
    pub(crate) fn keep(&mut self, cache: &mut KvCache, names: &[Name]) {
        while cache.len >= (cache.shared.len() + 1) * BLOCK {
            let (depth, used) = (cache.shared.len(), self.clock);
            let Some(name) = names.get(depth) else { return };
            let block = Arc::new(cache.own.remove(0));
            // A block that was computed twice is kept once.
            self.kept.entry(*name).or_insert_with(|| Kept { block: Arc::clone(&block), used, depth });
            cache.shared.push(block);
        }
    }

    /// Takes all blocks of a sequence back; kept ones stay for others.
    pub(crate) fn release(&mut self, cache: &mut KvCache) {
        self.clock += 1;
        self.spare.append(&mut cache.own);
        self.spare.extend(cache.shared.drain(..).filter_map(Arc::into_inner));
        cache.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::tiny;

    const VERSION: Version = Version(0);

    /// A cache that has passed `tokens`, with blocks from the pool; `None` if they do not suffice.
    fn passed(pool: &mut Pool, tokens: &[u32]) -> Option<KvCache> {
        let mut cache = KvCache::default();
        let mut names = Vec::new();
        for tokens in tokens.chunks(BLOCK) {
            if tokens.len() == BLOCK {
                names.push(name(names.last(), VERSION, tokens));
                if let Some(block) = names.last().and_then(|name| pool.find(name)) {
                    cache.adopt(block);
                    continue;
                }
            }
            let Some(mut block) = pool.take() else {
                pool.release(&mut cache);
                return None;
            };
            block.values[0] = tokens[0] as f32;
            cache.give(block);
            cache.advance(tokens.len());
            pool.keep(&mut cache, &names);
        }
        Some(cache)
    }

    proptest! {
        /// Whatever comes and goes, no block is lost, and none is in two hands that do not share it.
        #[test]
        fn blocks_are_neither_lost_nor_doubled(
            steps in prop::collection::vec((any::<bool>(), 0u32..3, 1usize..6, 0usize..8), 1..80),
        ) {
            let mut pool = Pool::new(&tiny::architecture(), 8 * BLOCK, &Placement::cpu()).unwrap();
            let mut running: Vec<(Vec<u32>, KvCache)> = Vec::new();
            for (begins, salt, blocks, at) in steps {
                if begins {
                    // Equal beginnings, and ends that differ.
                    let mut tokens: Vec<u32> = (0..(blocks * BLOCK - at) as u32).map(|n| n / 40 * salt).collect();
                    *tokens.first_mut().unwrap() = 7;
                    if let Some(cache) = passed(&mut pool, &tokens) {
                        running.push((tokens, cache));
                    }
                } else if !running.is_empty() {
                    let (_, mut cache) = running.swap_remove(at % running.len());
                    pool.release(&mut cache);
                    prop_assert_eq!(cache.blocks(), 0);
                }
                for (tokens, cache) in &running {
                    prop_assert_eq!(cache.len(), tokens.len());
                    let blocks = cache.shared.iter().map(|block| &**block).chain(&cache.own);
                    for (block, tokens) in blocks.zip(tokens.chunks(BLOCK)) {
                        prop_assert_eq!(block.values[0], tokens[0] as f32);
                    }
                }
                let own: usize = running.iter().map(|(_, cache)| cache.own.len()).sum();
                let mut shared: Vec<_> = running.iter().flat_map(|(_, cache)| &cache.shared).map(Arc::as_ptr).collect();
                shared.extend(pool.kept.values().map(|kept| Arc::as_ptr(&kept.block)));
                shared.sort();
                shared.dedup();
                prop_assert_eq!(own + shared.len() + pool.spare.len(), pool.made);
                prop_assert!(pool.made <= pool.capacity());
            }
            for (_, mut cache) in running {
                pool.release(&mut cache);
            }
            prop_assert_eq!(pool.available(), pool.capacity());
        }
    }

    #[test]
    fn names_tell_versions_and_histories_apart() {
        let first = name(None, Version(1), &[1, 2]);
        assert_eq!(first, name(None, Version(1), &[1, 2]));
        assert_ne!(first, name(None, Version(2), &[1, 2]));
        assert_ne!(name(Some(&first), Version(1), &[3]), name(None, Version(1), &[3]));
    }

    #[test]
    fn the_beginning_outlives_the_end() {
        let mut pool = Pool::new(&tiny::architecture(), 4 * BLOCK, &Placement::cpu()).unwrap();
        let tokens: Vec<u32> = (0..(3 * BLOCK) as u32).collect();
        let mut cache = passed(&mut pool, &tokens).unwrap();
        pool.release(&mut cache);
        assert_eq!((pool.idle(), pool.available()), (3, 4));
        let others: Vec<u32> = (1000..1000 + (2 * BLOCK) as u32).collect();
        let mut other = passed(&mut pool, &others).unwrap();
        assert_eq!(pool.evicted, 1);
        let first = name(None, VERSION, &tokens[..BLOCK]);
        let last = name(
            Some(&name(Some(&first), VERSION, &tokens[BLOCK..2 * BLOCK])),
            VERSION,
            &tokens[2 * BLOCK..],
        );
        assert!(pool.find(&first).is_some() && pool.find(&last).is_none());
        pool.release(&mut other);
    }
}
