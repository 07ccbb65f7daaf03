//! What `echo` is compared with: hyper and rustls with nothing around them but the same codec. A process of its own.

use dom0d::config;
use dom0d::host::certificate;
use dom0d::model::Timestamp;
use dom0d::wire::{Answer, Value, decode_call, encode_response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;

/// With the daemon's certificate, and as many workers as the daemon has.
pub fn serve(tls_dir: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(accept(TlsAcceptor::from(Arc::new(tls(tls_dir)))));
}

fn tls(dir: &Path) -> rustls::ServerConfig {
    let names = certificate::Names { hostname: String::new(), addresses: Vec::new() };
    let identity = certificate::ensure(dir, &names, Timestamp::now()).unwrap();
    let chain = CertificateDer::pem_slice_iter(identity.chain_pem.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.expose().as_bytes()).unwrap();
    rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap()
}

async fn accept(acceptor: TlsAcceptor) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    super::say(&listener.local_addr().unwrap().to_string());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let _ = stream.set_nodelay(true);
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let serving = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(echo));
            let _ = serving.await;
        });
    }
}

async fn echo(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let (_, params) = decode_call(&body, &config::Wire::default()).unwrap();
    let value = params.into_iter().next().unwrap_or(Value::Nil);
    let chunk = encode_response(&Answer::Value(value), usize::MAX).unwrap().remove(0);
    let mut response = Response::new(Full::new(chunk));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/xml"));
    Ok(response)
}
