//! Appending to paged caches on a GPU, against the reference and against what is refused. `FLASHINFER_RS_RUN_GPU_TESTS=1
//! cargo test --features cudarc,page --test page_gpu` runs them, within 60 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;

use cudarc::driver::CudaSlice;
use data::Random;
use flashinfer_rs::kernels::page::{
    KvLayout, PagedKvCache, PagedMlaCache, append_paged_kv_cache, append_paged_mla_kv_cache, is_supported,
};
use flashinfer_rs::{
    DType, Device, FlashInferError, LaunchGraph, OnDevice, PageTable, Placed, Stream, TensorMut, TensorRef, Tokens,
};
use gpu::Gpu;

fn main() -> ExitCode {
    gpu::main(&[
        ("random_batches_are_appended_bit_for_bit", random_batches),
        ("latent_caches_are_appended_bit_for_bit", latent),
        ("the_halves_of_one_buffers_pages_are_a_cache", combined),
        ("a_cache_may_have_more_than_two_to_the_32_elements", large),
        ("what_breaks_the_contract_is_refused", refused),
        ("a_replayed_graph_appends_where_the_new_tokens_say", replayed),
        ("calls_do_not_wait", asynchronous),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

fn below(random: &mut Random, end: i64) -> i64 {
    ((random.uniform() * end as f64) as i64).min(end - 1)
}

fn bytes(random: &mut Random, count: i64) -> Vec<u8> {
    (0..count).map(|_| below(random, 256) as u8).collect()
}

/// Requests with pages in random order, some of them with tokens already, and as many tokens for each as fit.
fn batch(random: &mut Random, page_size: i64, pages: i64) -> (PageTable, Vec<i64>) {
    let mut free: Vec<i32> = (0..pages as i32).collect();
    for i in 0..free.len() {
        let other = i + below(random, (free.len() - i) as i64) as usize;
        free.swap(i, other);
    }
    let mut table = PageTable::new(page_size, pages, 1 << 20).unwrap();
    let mut counts = Vec::new();
    while !free.is_empty() && counts.len() < 9 {
        let has = 1 + below(random, (free.len() as i64).min(4));
        let own: Vec<i32> = free.drain(..has as usize).collect();
        let length = below(random, has * page_size);
        table.push(&own, length).unwrap();
        counts.push(below(random, has * page_size - length + 1));
    }
    (table, counts)
}

fn random_batches(gpu: &Gpu) {
    let stream = &gpu.stream;
    for seed in 0..48u64 {
        let mut random = Random(seed);
        let dtype = [DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2][seed as usize % 4];
        let layout = if seed % 3 == 0 { KvLayout::Hnd } else { KvLayout::Nhd };
        let head_dim = [64, 128, 256, 512][below(&mut random, 4) as usize];
        let heads = [1, 2, 8, 32][below(&mut random, 4) as usize];
        let (page_size, pages) = ([1, 5, 16, 64][below(&mut random, 4) as usize], 3 + below(&mut random, 30));
        let (mut table, counts) = batch(&mut random, page_size, pages);
        let tokens = table.append(&counts).unwrap();
        let count = tokens.positions().len() as i64;
        let size = dtype.size() as i64;
        let shape = match layout {
            KvLayout::Nhd => [pages, page_size, heads, head_dim],
            KvLayout::Hnd => [pages, heads, page_size, head_dim],
        };
        let key_shape = [count, heads, head_dim];
        let cache_len = shape.iter().product::<i64>() * size;
        let key_len = key_shape.iter().product::<i64>() * size;
        let [mut k, mut v] = [(); 2].map(|()| bytes(&mut random, cache_len));
        let [key, value] = [(); 2].map(|()| bytes(&mut random, key_len.max(16)));
        let (mut k_gpu, mut v_gpu) = (stream.clone_htod(&k).unwrap(), stream.clone_htod(&v).unwrap());
        let (key_gpu, value_gpu) = (stream.clone_htod(&key).unwrap(), stream.clone_htod(&value).unwrap());
        let on_gpu = OnDevice::new(tokens.clone(), stream).unwrap();
        {
            let mut cache =
                PagedKvCache::new(write(gpu, &mut k_gpu, dtype, &shape), write(gpu, &mut v_gpu, dtype, &shape), layout)
                    .unwrap();
            append_paged_kv_cache(
                &mut cache,
                &read(gpu, &key_gpu, dtype, &key_shape),
                &read(gpu, &value_gpu, dtype, &key_shape),
                &on_gpu.placed(stream).unwrap(),
                Stream::cudarc(stream),
            )
            .unwrap();
        }
        // SAFETY: bytes of as many elements as the shapes say, whose bits are numbers of the types.
        unsafe {
            let k = TensorMut::from_raw(k.as_mut_ptr().cast(), Device::Cpu, dtype, &shape, None).unwrap();
            let v = TensorMut::from_raw(v.as_mut_ptr().cast(), Device::Cpu, dtype, &shape, None).unwrap();
            let key = TensorRef::from_raw(key.as_ptr().cast(), Device::Cpu, dtype, &key_shape, None).unwrap();
            let value = TensorRef::from_raw(value.as_ptr().cast(), Device::Cpu, dtype, &key_shape, None).unwrap();
            let (mut cache, placed) = (PagedKvCache::new(k, v, layout).unwrap(), Placed::on_host(&tokens).unwrap());
            append_paged_kv_cache(&mut cache, &key, &value, &placed, Stream::NULL).unwrap();
        }
        let what = format!("{dtype} {shape:?} {layout:?} of {count} tokens, seed {seed}");
        assert!(stream.clone_dtoh(&k_gpu).unwrap() == k, "keys of {what}");
        assert!(stream.clone_dtoh(&v_gpu).unwrap() == v, "values of {what}");
    }
}

/// Bytes as a tensor of 16-bit or 8-bit numbers.
fn write<'a>(gpu: &'a Gpu, buffer: &'a mut CudaSlice<u8>, dtype: DType, shape: &[i64]) -> TensorMut<'a> {
    use cudarc::driver::DevicePtrMut;
    let (address, guard) = buffer.device_ptr_mut(&gpu.stream);
    drop(guard);
    // SAFETY: the buffer has as many bytes, is used on this stream alone, and is borrowed for as long as the tensor.
    unsafe { TensorMut::from_raw(address as *mut _, Device::Cuda(0), dtype, shape, None) }.unwrap()
}

fn read<'a>(gpu: &'a Gpu, buffer: &'a CudaSlice<u8>, dtype: DType, shape: &[i64]) -> TensorRef<'a> {
    use cudarc::driver::DevicePtr;
    let (address, guard) = buffer.device_ptr(&gpu.stream);
    drop(guard);
    // SAFETY: as in `write`.
    unsafe { TensorRef::from_raw(address as *const _, Device::Cuda(0), dtype, shape, None) }.unwrap()
}

fn latent(gpu: &Gpu) {
    let stream = &gpu.stream;
    for seed in 100..116u64 {
        let mut random = Random(seed);
        let dtype = [DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2][seed as usize % 4];
        let (page_size, pages) = ([1, 5, 64][below(&mut random, 3) as usize], 3 + below(&mut random, 20));
        let (mut table, counts) = batch(&mut random, page_size, pages);
        let tokens = table.append(&counts).unwrap();
        let (count, size) = (tokens.positions().len() as i64, dtype.size() as i64);
        let (ckv_shape, kpe_shape) = ([pages, page_size, 512], [pages, page_size, 64]);
        let (mut ckv, mut kpe) =
            (bytes(&mut random, pages * page_size * 512 * size), bytes(&mut random, pages * page_size * 64 * size));
        let (new_ckv, new_kpe) =
            (bytes(&mut random, (count * 512 * size).max(16)), bytes(&mut random, (count * 64 * size).max(16)));
        let (mut ckv_gpu, mut kpe_gpu) = (stream.clone_htod(&ckv).unwrap(), stream.clone_htod(&kpe).unwrap());
        let (new_ckv_gpu, new_kpe_gpu) = (stream.clone_htod(&new_ckv).unwrap(), stream.clone_htod(&new_kpe).unwrap());
        let on_gpu = OnDevice::new(tokens.clone(), stream).unwrap();
        {
            let (ckv, kpe) = (write(gpu, &mut ckv_gpu, dtype, &ckv_shape), write(gpu, &mut kpe_gpu, dtype, &kpe_shape));
            append_paged_mla_kv_cache(
                &mut PagedMlaCache::new(ckv, kpe).unwrap(),
                &read(gpu, &new_ckv_gpu, dtype, &[count, 512]),
                &read(gpu, &new_kpe_gpu, dtype, &[count, 64]),
                &on_gpu.placed(stream).unwrap(),
                Stream::cudarc(stream),
            )
            .unwrap();
        }
        // SAFETY: bytes of as many elements as the shapes say, whose bits are numbers of the types.
        unsafe {
            let ckv = TensorMut::from_raw(ckv.as_mut_ptr().cast(), Device::Cpu, dtype, &ckv_shape, None).unwrap();
            let kpe = TensorMut::from_raw(kpe.as_mut_ptr().cast(), Device::Cpu, dtype, &kpe_shape, None).unwrap();
            let new_ckv =
                TensorRef::from_raw(new_ckv.as_ptr().cast(), Device::Cpu, dtype, &[count, 512], None).unwrap();
            let new_kpe = TensorRef::from_raw(new_kpe.as_ptr().cast(), Device::Cpu, dtype, &[count, 64], None).unwrap();
            let (mut cache, placed) = (PagedMlaCache::new(ckv, kpe).unwrap(), Placed::on_host(&tokens).unwrap());
            append_paged_mla_kv_cache(&mut cache, &new_ckv, &new_kpe, &placed, Stream::NULL).unwrap();
        }
        let what = format!("{dtype} of {count} tokens, seed {seed}");
        assert!(stream.clone_dtoh(&ckv_gpu).unwrap() == ckv, "compressed, {what}");
        assert!(stream.clone_dtoh(&kpe_gpu).unwrap() == kpe, "rotary, {what}");
    }
}

/// Five tokens of a request in pages 2 and 0 of three pages of four tokens.
fn tokens() -> Tokens {
    let mut table = PageTable::new(4, 3, 100).unwrap();
    table.push(&[2, 0], 1).unwrap();
    table.append(&[5]).unwrap()
}

fn combined(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (heads, size) = (2i64, 64i64);
    let token = (heads * size) as usize;
    let mut random = Random(7);
    let (key, value): (Vec<half::f16>, Vec<half::f16>) = (random.normal(5 * token), random.normal(5 * token));
    // Pages of keys and then values.
    let mut both = stream.alloc_zeros::<half::f16>(3 * 2 * 4 * token).unwrap();
    let strides = [2 * 4 * heads * size, heads * size, size, 1];
    {
        let half = 4 * token;
        // SAFETY: both halves of the pages are inside the buffer and disjoint.
        let [k, v] = [0, half].map(|start| unsafe {
            use cudarc::driver::DevicePtrMut;
            let address = both.device_ptr_mut(stream).0 + 2 * start as u64;
            let shape = [3, 4, heads, size];
            TensorMut::from_raw(address as *mut _, Device::Cuda(0), DType::F16, &shape, Some(&strides)).unwrap()
        });
        let mut cache = PagedKvCache::new(k, v, KvLayout::Nhd).unwrap();
        let (key, value) = (stream.clone_htod(&key).unwrap(), stream.clone_htod(&value).unwrap());
        let on_gpu = OnDevice::new(tokens(), stream).unwrap();
        append_paged_kv_cache(
            &mut cache,
            &TensorRef::from_cudarc(stream, &key, &[5, heads, size]).unwrap(),
            &TensorRef::from_cudarc(stream, &value, &[5, heads, size]).unwrap(),
            &on_gpu.placed(stream).unwrap(),
            Stream::cudarc(stream),
        )
        .unwrap();
        stream.synchronize().unwrap();
    }
    let found = stream.clone_dtoh(&both).unwrap();
    let mut expected = vec![half::f16::ZERO; found.len()];
    for (i, (page, entry)) in [(2, 1), (2, 2), (2, 3), (0, 0), (0, 1)].into_iter().enumerate() {
        for (part, from) in [(0, &key), (1, &value)] {
            let at = ((page * 2 + part) * 4 + entry) * token;
            expected[at..at + token].copy_from_slice(&from[i * token..][..token]);
        }
    }
    assert_eq!(found, expected);
}

/// The last page of a cache whose elements 32 bits do not count.
fn large(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (pages, page_size, heads, size) = (33_000i64, 16i64, 64i64, 128i64);
    let len = (pages * page_size * heads * size) as usize;
    assert!(len > 1 << 32);
    let mut table = PageTable::new(page_size, pages, 100).unwrap();
    table.push(&[pages as i32 - 1], 15).unwrap();
    let on_gpu = OnDevice::new(table.append(&[1]).unwrap(), stream).unwrap();
    let (mut k, mut v) = (stream.alloc_zeros::<u8>(len).unwrap(), stream.alloc_zeros::<u8>(len).unwrap());
    let token = (heads * size) as usize;
    let (key, value) =
        (stream.clone_htod(&vec![0x38u8; token]).unwrap(), stream.clone_htod(&vec![0x39u8; token]).unwrap());
    {
        let shape = [pages, page_size, heads, size];
        let mut cache = PagedKvCache::new(
            TensorMut::from_cudarc_bytes(stream, &mut k, DType::F8E4M3, &shape).unwrap(),
            TensorMut::from_cudarc_bytes(stream, &mut v, DType::F8E4M3, &shape).unwrap(),
            KvLayout::Nhd,
        )
        .unwrap();
        append_paged_kv_cache(
            &mut cache,
            &TensorRef::from_cudarc_bytes(stream, &key, DType::F8E4M3, &[1, heads, size]).unwrap(),
            &TensorRef::from_cudarc_bytes(stream, &value, DType::F8E4M3, &[1, heads, size]).unwrap(),
            &on_gpu.placed(stream).unwrap(),
            Stream::cudarc(stream),
        )
        .unwrap();
    }
    for (cache, byte) in [(&k, 0x38), (&v, 0x39)] {
        let end = stream.clone_dtoh(&cache.slice(len - 2 * token..)).unwrap();
        assert!(end[..token].iter().all(|b| *b == 0) && end[token..].iter().all(|b| *b == byte));
        let wrapped = stream.clone_dtoh(&cache.slice(..1 << 20)).unwrap();
        assert!(wrapped.iter().all(|b| *b == 0));
    }
}

fn refused(gpu: &Gpu) {
    let stream = &gpu.stream;
    let on_gpu = OnDevice::new(tokens(), stream).unwrap();
    let placed = on_gpu.placed(stream).unwrap();
    let named = |heads: i64, size: i64, shift: usize| {
        let token = (heads * size) as usize;
        let key = stream.alloc_zeros::<half::bf16>(5 * token + 8).unwrap();
        let (mut k, mut v) = (
            stream.alloc_zeros::<half::bf16>(12 * token).unwrap(),
            stream.alloc_zeros::<half::bf16>(12 * token).unwrap(),
        );
        let shape = [3, 4, heads, size];
        let mut cache = PagedKvCache::new(
            TensorMut::from_cudarc(stream, &mut k, &shape).unwrap(),
            TensorMut::from_cudarc(stream, &mut v, &shape).unwrap(),
            KvLayout::Nhd,
        )
        .unwrap();
        let part = key.slice(shift..);
        let key = TensorRef::from_cudarc(stream, &part, &[5, heads, size]).unwrap();
        match append_paged_kv_cache(&mut cache, &key, &key, &placed, Stream::cudarc(stream)) {
            Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
            other => panic!("{heads} heads of {size}: {other:?}"),
        }
    };
    assert_eq!(named(1, 96, 0), "head_dim");
    assert_eq!(named(129, 64, 0), "heads");
    assert_eq!(named(33, 256, 0), "heads");
    assert_eq!(named(8, 128, 1), "append_key");
    // Pages of 4-bit numbers are none of ours, and a cache on the host none of the GPU's.
    let mut bytes = [stream.alloc_zeros::<u8>(12 * 64).unwrap(), stream.alloc_zeros::<u8>(12 * 64).unwrap()];
    let [k, v] = bytes.each_mut().map(|b| TensorMut::from_cudarc(stream, b, &[3, 4, 1, 64]).unwrap());
    let mut cache = PagedKvCache::new(k, v, KvLayout::Nhd).unwrap();
    let key = stream.alloc_zeros::<u8>(5 * 64).unwrap();
    let key = TensorRef::from_cudarc(stream, &key, &[5, 1, 64]).unwrap();
    let error = append_paged_kv_cache(&mut cache, &key, &key, &placed, Stream::cudarc(stream)).unwrap_err();
    assert!(error.to_string().contains("U8"), "{error}");
    let on_host = tokens();
    let elsewhere = Placed::on_host(&on_host).unwrap();
    let bf16s = stream.alloc_zeros::<half::bf16>(12 * 64).unwrap();
    let (mut k, mut v) = (bf16s.clone(), bf16s.clone());
    let mut cache = PagedKvCache::new(
        TensorMut::from_cudarc(stream, &mut k, &[3, 4, 1, 64]).unwrap(),
        TensorMut::from_cudarc(stream, &mut v, &[3, 4, 1, 64]).unwrap(),
        KvLayout::Nhd,
    )
    .unwrap();
    let key = TensorRef::from_cudarc(stream, &bf16s, &[5, 1, 64]).unwrap();
    match append_paged_kv_cache(&mut cache, &key, &key, &elsewhere, Stream::cudarc(stream)) {
        Err(FlashInferError::InvalidArgument { argument: "batch_indices", .. }) => {}
        other => panic!("{other:?}"),
    }
}

fn replayed(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (page_size, pages, heads, size) = (4i64, 9i64, 2i64, 64i64);
    let token = (heads * size) as usize;
    let mut table = PageTable::new(page_size, pages, 24).unwrap();
    table.push(&[1, 4, 6], 3).unwrap();
    table.push(&[8, 2], 0).unwrap();
    let first = table.append(&[1, 1]).unwrap().with_room_for(6, 3).unwrap();
    let key: Vec<half::bf16> = Random(3).normal(2 * token);
    let cache_len = (pages * page_size) as usize * token;
    let buffers = (
        (stream.clone_htod(&key).unwrap(), OnDevice::new(first, stream).unwrap()),
        (stream.alloc_zeros::<half::bf16>(cache_len).unwrap(), stream.alloc_zeros::<half::bf16>(cache_len).unwrap()),
    );
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    graph
        .capture(|s, ((key, tokens), (mut k, mut v))| {
            let shape = [pages, page_size, heads, size];
            let mut cache = PagedKvCache::new(k.write(&shape)?, v.write(&shape)?, KvLayout::Nhd)?;
            let key = key.read(&[2, heads, size])?;
            append_paged_kv_cache(&mut cache, &key, &key, &tokens.placed()?, s)
        })
        .unwrap();
    graph.launch().unwrap();
    let mut expected = vec![half::bf16::ZERO; cache_len];
    let mut place = |token_at: usize, page: usize, entry: usize| {
        let at = (page * page_size as usize + entry) * token;
        expected[at..at + token].copy_from_slice(&key[token_at * token..][..token]);
    };
    place(0, 1, 3);
    place(1, 8, 0);
    // Both tokens to one request, which moves on to its next page.
    let next = table.append(&[2, 0]).unwrap();
    place(0, 4, 0);
    place(1, 4, 1);
    {
        let ((_, mut tokens), _) = graph.buffers().unwrap();
        tokens.replace(&next, stream).unwrap();
        // What does not fit is refused, and leaves what is there.
        let three = table.clone().append(&[2, 1]).unwrap();
        assert!(tokens.replace(&three, stream).unwrap_err().to_string().contains("as captured"));
        let mut other = PageTable::new(page_size, pages + 1, 24).unwrap();
        other.push(&[9], 0).unwrap();
        assert!(tokens.replace(&other.append(&[2]).unwrap(), stream).is_err(), "a table for a larger cache");
    }
    graph.launch().unwrap();
    let (_, (k, v)) = graph.into_buffers().unwrap();
    assert_eq!(stream.clone_dtoh(&k).unwrap(), expected);
    assert_eq!(stream.clone_dtoh(&v).unwrap(), expected);
}

fn asynchronous(gpu: &Gpu) {
    let stream = &gpu.stream;
    let on_gpu = OnDevice::new(tokens(), stream).unwrap();
    let bf16s = stream.alloc_zeros::<half::bf16>(12 * 64).unwrap();
    let (mut k, mut v) = (bf16s.clone(), bf16s.clone());
    let mut append = || {
        let mut cache = PagedKvCache::new(
            TensorMut::from_cudarc(stream, &mut k, &[3, 4, 1, 64]).unwrap(),
            TensorMut::from_cudarc(stream, &mut v, &[3, 4, 1, 64]).unwrap(),
            KvLayout::Nhd,
        )
        .unwrap();
        let key = TensorRef::from_cudarc(stream, &bf16s, &[5, 1, 64]).unwrap();
        let placed = on_gpu.placed(stream).unwrap();
        append_paged_kv_cache(&mut cache, &key, &key, &placed, Stream::cudarc(stream)).unwrap();
    };
    append();
    gpu.assert_asynchronous(stream, append);
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
